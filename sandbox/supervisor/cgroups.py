"""Memory of a whole run, all its processes and files together, by control groups: version 2, version 1, or none.

Which driver a machine has is found out by using it. Where none can be used, memory is limited for each process only
(RLIMIT_AS), and `capabilities` says so.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_PREFIX = "retool-sandbox-"
_MIB = 1024 * 1024
_UNLIMITED = 1 << 40
_TRIAL = ("/bin/sleep", "5")


@dataclass(frozen=True)
class Driver:
    """How a version of control groups names its files."""

    name: str
    limit: str
    swap: str
    events: str

    def start(self, folder: Path) -> None:
        """Make the groups below `folder` count memory. Raises `OSError`."""
        if self.name == "v2":
            Path(folder, "cgroup.subtree_control").write_text("+memory")


V2 = Driver("v2", "memory.max", "memory.swap.max", "memory.events")
V1 = Driver("v1", "memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.oom_control")


def _own_path(version: Driver) -> str:
    """The group of this process, below the mount point of the hierarchy."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        if names == "" if version is V2 else "memory" in names.split(","):
            return path.lstrip("/")
    return ""


def _places() -> Iterator[tuple[Driver, Path]]:
    """Where groups might be made: below our own group first, then at the top."""
    for version, mounts in ((V2, (_MOUNT, _MOUNT / "unified")), (V1, (_MOUNT / "memory",))):
        for mount in mounts:
            if Path(mount, "cgroup.procs").exists():
                for path in dict.fromkeys((_own_path(version), "")):
                    yield version, Path(mount, path)


class Group:
    """One run's group; used again by another run when it is empty."""

    def __init__(self, driver: Driver, folder: Path) -> None:
        self._driver, self.folder = driver, folder
        folder.mkdir()
        self.procs = os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
        """A descriptor that puts whoever writes 0 to it into the group."""
        self._mib = _UNLIMITED
        self.lent_at = 0
        """Kills that had happened in it before its present run."""
        _KILLS[self] = 0

    def limit(self, mib: int) -> None:
        """The most that the group may hold. Raises `OSError`."""
        if mib == self._mib:
            return
        names = [self._driver.limit, self._driver.swap]
        # Version 1 demands that memory never exceeds memory and swap together: raise the second first, lower it last.
        for name in reversed(names) if self._driver is V1 and mib > self._mib else names:
            path = self.folder / name
            if name != self._driver.swap or path.exists():
                path.write_text(str(0 if self._driver is V2 and name == self._driver.swap else mib * _MIB))
        self._mib = mib

    def kills(self) -> int:
        """How often the kernel has killed something of the group for its memory, ever."""
        with contextlib.suppress(OSError):
            lines = Path(self.folder, self._driver.events).read_text().splitlines()
            _KILLS[self] = sum(int(line.split()[1]) for line in lines if line.startswith("oom_kill "))
        return _KILLS.get(self, 0)

    def close(self) -> None:
        """Remove the group; processes in it must be dead."""
        if self.procs >= 0:
            os.close(self.procs)
            self.procs = -1
            _KILLS[None] += self.kills()
            del _KILLS[self]
        with contextlib.suppress(OSError):
            self.folder.rmdir()


_KILLS: dict[Group | None, int] = {None: 0}  # of every group there is; None: in those that were removed


def kills() -> dict[Group | None, int]:
    """`Group.kills` of every group that this process has made; under None the sum of those that it has removed."""
    for group in _KILLS:
        if group is not None:
            group.kills()
    return _KILLS.copy()


_KEPT = 16  # empty groups; sessions may have taken hundreds


@dataclass
class Groups:
    """The groups of one supervisor."""

    driver: Driver
    folder: Path
    _free: list[Group] = field(default_factory=list)
    _made: int = 0

    def take(self) -> Group:
        """An empty group. Raises `OSError`."""
        if self._free:
            return self._free.pop()
        self._made += 1
        return Group(self.driver, self.folder / str(self._made))

    def give_back(self, group: Group) -> None:
        """After a run whose processes are dead."""
        group.lent_at = group.kills()
        if len(self._free) < _KEPT:
            self._free.append(group)
        else:
            group.close()

    def close(self) -> None:
        """Remove every group; processes in them must be dead."""
        for group in [group for group in _KILLS if group is not None]:
            group.close()
        self._free.clear()
        with contextlib.suppress(OSError):
            self.folder.rmdir()


def _try_out(groups: Groups) -> None:
    """Put a process of ours into a group with a limit. Raises `OSError` where that does not work."""
    group = groups.take()
    try:
        group.limit(64)
        with subprocess.Popen(_TRIAL, stdin=subprocess.DEVNULL, env={}, cwd="/") as process:
            try:
                os.write(group.procs, str(process.pid).encode())
            finally:
                process.kill()
    finally:
        groups.give_back(group)


def _sweep(place: Path) -> None:
    """Remove what supervisors that were killed left behind."""
    for folder in place.glob(f"{_PREFIX}*"):
        if not Path("/proc", folder.name.removeprefix(_PREFIX)).exists():
            for inner in (*folder.glob("*/"), folder):
                with contextlib.suppress(OSError):
                    inner.rmdir()


def remove_of(pid: int) -> None:
    """Remove the groups of a supervisor that was killed; its processes end with it, which may take a moment."""
    for _, place in _places():
        folder = place / f"{_PREFIX}{pid}"
        for _ in range(50):
            for inner in (*folder.glob("*/"), folder):
                with contextlib.suppress(OSError):
                    inner.rmdir()
            if not folder.exists():
                break
            time.sleep(0.02)


def find() -> Groups | None:
    """The groups of this machine, proven to work; None where there are none that we may use."""
    for driver, place in _places():
        groups = Groups(driver, place / f"{_PREFIX}{os.getpid()}")
        try:
            _sweep(place)
            groups.folder.mkdir()
            driver.start(groups.folder)
            _try_out(groups)
        except OSError:
            groups.close()
            continue
        return groups
    return None
