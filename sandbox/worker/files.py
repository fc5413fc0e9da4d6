"""Files in and out of a work folder, done by the confined process itself: what it cannot reach, nobody fetches.

Names were checked by the supervisor (`sandbox/paths.py`); here every component is opened without following links, and
only regular files with one name are read or written. Raises `FileError` with a code of `SessionError`.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Iterator

from sandbox.paths import BRANCHES, MAX_ENTRIES

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # a FIFO must not block us
MAX_DEPTH = 64


class FileError(Exception):
    """`code` as in `SessionError`."""

    def __init__(self, message: str, code: str) -> None:
        super().__init__(message)
        self.code = code


@contextlib.contextmanager
def _parent(root: str, path: str, create: bool) -> Iterator[tuple[int, str]]:
    """The folder that holds `path`, as a descriptor, and the last component."""
    *folders, name = path.split("/")
    fd = os.open(root, _FOLDER)
    try:
        for folder in folders:
            if create:
                with contextlib.suppress(FileExistsError):
                    os.mkdir(folder, 0o700, dir_fd=fd)
            inner = os.open(folder, _FOLDER, dir_fd=fd)
            os.close(fd)
            fd = inner
        yield fd, name
    finally:
        os.close(fd)


def _refuse(error: OSError, path: str) -> FileError:
    if error.errno in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
        return FileError(f"{path}: {error.strerror}", "too_large")
    if error.errno == errno.ENOENT:
        return FileError(f"{path}: there is no such file", "no_file")
    return FileError(f"{path}: {error.strerror}", "bad_path")


def _check(fd: int, path: str) -> int:
    """Size of a regular file with one name."""
    found = os.fstat(fd)
    if not stat.S_ISREG(found.st_mode):
        raise FileError(f"{path}: not a regular file", "no_file")
    if found.st_nlink != 1:
        raise FileError(f"{path}: has several names or none", "no_file")
    return found.st_size


def write(root: str, path: str, data: bytes) -> None:
    """Create or replace a file; folders on the way are made."""
    try:
        with _parent(root, path, create=True) as (folder, name):
            fd = os.open(name, os.O_WRONLY | os.O_CREAT | _FILE, 0o600, dir_fd=folder)
            try:
                _check(fd, path)
                os.ftruncate(fd, 0)
                view = memoryview(data)
                while view:
                    view = view[os.write(fd, view) :]
            finally:
                os.close(fd)
    except OSError as error:
        raise _refuse(error, path) from None


def read(root: str, path: str, cap: int) -> bytes:
    """A file of at most `cap` bytes."""
    try:
        with _parent(root, path, create=False) as (folder, name):
            fd = os.open(name, os.O_RDONLY | _FILE, dir_fd=folder)
            try:
                size = _check(fd, path)
                chunks: list[bytes] = []
                left = cap + 1
                while left and (chunk := os.read(fd, min(left, 1 << 20))):
                    chunks.append(chunk)
                    left -= len(chunk)
            finally:
                os.close(fd)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.ENOTDIR, errno.ENXIO):
            raise FileError(f"{path}: not a regular file", "no_file") from None
        raise _refuse(error, path) from None
    if not left:
        raise FileError(f"{path}: {max(size, cap + 1)} bytes; at most {cap} can be fetched", "too_large")
    return b"".join(chunks)


def walk(folder: int, prefix: str = "", depth: int = 0) -> Iterator[tuple[int, str, str, os.stat_result]]:
    """Everything below the folder descriptor, sorted: (descriptor of its folder, name, path, what it is)."""
    with os.scandir(folder) as entries:
        names = sorted(entry.name for entry in entries)
    for name in names:
        if not prefix and name == BRANCHES:
            continue
        try:
            found = os.stat(name, dir_fd=folder, follow_symlinks=False)
        except FileNotFoundError:
            continue
        path = f"{prefix}{name}"
        yield folder, name, path, found
        if stat.S_ISDIR(found.st_mode) and depth < MAX_DEPTH:
            try:
                inner = os.open(name, _FOLDER, dir_fd=folder)
            except OSError:
                continue
            try:
                yield from walk(inner, path + "/", depth + 1)
            finally:
                os.close(inner)


def listing(root: str) -> list[tuple[str, int]]:
    """Regular files as (path, size), sorted; undecodable bytes of names as lone surrogates."""
    rows: list[tuple[str, int]] = []
    fd = os.open(root, _FOLDER)
    try:
        for _, _, path, found in walk(fd):
            if stat.S_ISREG(found.st_mode):
                rows.append((path, found.st_size))
            if len(rows) > MAX_ENTRIES:
                raise FileError(f"more than {MAX_ENTRIES} files: too many to list", "too_large")
    except OSError as error:
        raise _refuse(error, ".") from None
    finally:
        os.close(fd)
    return sorted(rows)
