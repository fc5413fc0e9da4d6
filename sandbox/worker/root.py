"""The private file system of tier `ns`: a tmpfs root with read-only binds of the interpreter and the system libraries.

Built once per warm unit, before the interpreter warms up; each child only adds its own work folder and /proc.
"""

from __future__ import annotations

import os
from pathlib import Path

from sandbox.linux import syscalls as sys_

SYSTEM_PATHS = ("/usr", "/lib", "/lib32", "/lib64", "/bin", "/sbin")
ETC_FILES = ("/etc/ld.so.cache", "/etc/localtime", "/etc/alternatives")
DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom")
WORKDIR = "/run/sandbox"
"""Where a child may write; /tmp and /dev/shm point here."""
_USERS = "root:x:0:0:root:/:/bin/false\nsandbox:x:1000:1000:sandbox:/run/sandbox:/bin/sh\n"
_GROUPS = "root:x:0:\nsandbox:x:1000:\n"


def _bind(source: str, root: str, *, device: bool = False) -> None:
    """Read-only, devices too: whoever may write to one could set its times, which everybody sees."""
    target = Path(root + source)
    if Path(source).is_dir():
        target.mkdir(parents=True, exist_ok=True, mode=0o755)
    else:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o755)
        target.touch()
    sys_.mount(source, str(target), "", sys_.MS_BIND | sys_.MS_REC)
    sys_.mount_readonly(str(target), device=device)


def _covered(path: str, others: list[str]) -> bool:
    return any(path == other or path.startswith(other.rstrip("/") + "/") for other in others)


def build(python_paths: tuple[str, ...]) -> None:
    """Replace this mount namespace's root; afterwards only system libraries and `python_paths` exist, read-only.

    The mount namespace must be ours. Raises `OSError` naming the step that failed.
    """
    sys_.mount("none", "/", "", sys_.MS_REC | sys_.MS_PRIVATE)
    root = "/tmp"  # any existing folder: the mount lives in our namespace only
    os.umask(0o022)
    binds: list[str] = []
    links: list[tuple[str, str]] = []
    for path in SYSTEM_PATHS:
        if os.path.islink(path):  # noqa: PTH114
            links.append((path, os.readlink(path)))  # noqa: PTH115
        elif Path(path).is_dir():
            binds.append(path)
    for path in python_paths:
        if not _covered(path, binds):
            binds.append(path)
    sources = {path: os.open(path, os.O_PATH | os.O_CLOEXEC) for path in binds if _covered(path, [root])}
    sys_.mount("tmpfs", root, "tmpfs", sys_.MS_NOSUID | sys_.MS_NODEV, "size=1m,mode=755")
    for path in binds:
        if path in sources:  # it lies below the folder we have just covered: reach it by descriptor
            target = root + path
            Path(target).mkdir(parents=True, exist_ok=True)
            sys_.mount(f"/proc/self/fd/{sources[path]}", target, "", sys_.MS_BIND | sys_.MS_REC)
            sys_.mount_readonly(target)
        else:
            _bind(path, root)
    for path, destination in links:
        Path(root + path).symlink_to(destination)
    for path in ETC_FILES:
        if Path(path).exists():
            _bind(path, root)
    for path in DEVICES:
        if Path(path).exists():
            _bind(path, root, device=True)
    Path(root, "etc").mkdir(exist_ok=True)
    Path(root, "etc/passwd").write_text(_USERS)
    Path(root, "etc/group").write_text(_GROUPS)
    for name in ("proc", WORKDIR.lstrip("/")):
        Path(root, name).mkdir(exist_ok=True, parents=True, mode=0o755)
    Path(root, "dev").mkdir(exist_ok=True)
    for name in ("/dev/shm", "/tmp"):
        if not Path(root + name).exists():  # /tmp exists when the interpreter itself lives below it
            Path(root + name).symlink_to(WORKDIR)
    sys_.mount("/proc", root + "/proc", "", sys_.MS_BIND | sys_.MS_REC)
    os.chdir(root)
    sys_.pivot_root(".", ".")
    sys_.umount_detach(".")
    os.chdir("/")
    sys_.mount("none", "/", "", 32 | sys_.MS_BIND | sys_.MS_RDONLY | sys_.MS_NOSUID | sys_.MS_NODEV)
