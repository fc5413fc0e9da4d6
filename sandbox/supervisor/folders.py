"""The disk that runs write to: whether it has room, and how a work folder is removed, whatever its run made of it."""

from __future__ import annotations

import contextlib
import os
import subprocess

_SCRIPT = 'chmod -R u+rwX -- "$1" 2>/dev/null; rm -rf -- "$1"'  # folders within folders that nobody may enter
_ATTEMPTS = 3
_SLACK = 64 * 1024
_FEW_FILES = 4


def full(path: str, size: int = 0) -> bool:
    """Whether the disk that `path` is on has no room for `size` bytes more, or for another few files."""
    try:
        disk = os.statvfs(path)
    except OSError:
        return True
    return disk.f_bavail * disk.f_frsize < size + _SLACK or (disk.f_files > 0 and disk.f_favail < _FEW_FILES)


def remove_empty(path: str) -> bool:
    """Remove a folder that holds nothing, which is what most runs leave; False when it needs `remove`."""
    try:
        os.rmdir(path)  # noqa: PTH106
    except FileNotFoundError:
        return True
    except OSError:
        return False
    return True


def remove(path: str, uid: int) -> bool:
    """Remove a folder and everything in it; True when it is gone. Blocks: call it in a thread.

    `chmod` and `rm` cope with any depth and never follow links. They run as the user `uid` that made the files (0: as
    ourselves), since root without CAP_DAC_OVERRIDE may not look into them; the folder itself is then ours to remove.
    """
    # Nothing of ours is inherited, and user code has no process left that could interfere.
    user = {"user": uid, "group": uid, "extra_groups": ()} if uid else {}
    for _ in range(_ATTEMPTS):
        with contextlib.suppress(OSError):
            subprocess.run(  # type: ignore[call-overload]
                ["/bin/sh", "-c", _SCRIPT, "sh", path],
                check=False,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                cwd="/",
                **user,
            )
        if remove_empty(path):
            return True
    return False
