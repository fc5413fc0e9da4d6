"""The warden: a small, bare process that owns a warm unit.

It makes the unit's namespaces, forks the zygote, and on command makes an init for one run's process namespace or kills
everything of one user id. When the supervisor goes away, however it goes, the warden takes the unit down.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
from pathlib import Path
from typing import Any, NoReturn

from sandbox import wire
from sandbox.linux import landlock
from sandbox.linux import syscalls as sys_
from sandbox.profiles import PROFILES
from sandbox.tiers import BY_NAME, Tier
from sandbox.worker import init, root
from sandbox.worker.jail import JAIL_ID, Jail, readable_paths, write_id_maps
from sandbox.worker.memory import address_space, threads
from sandbox.worker.zygote import Zygote, warm

_NAMESPACES = sys_.CLONE_NEWUSER | sys_.CLONE_NEWNS | sys_.CLONE_NEWIPC | sys_.CLONE_NEWUTS | sys_.CLONE_NEWNET


def enter_namespaces(python_paths: tuple[str, ...], uid: int) -> None:
    """Private root, no network, no privilege outside. Root becomes `uid` first, so that nothing maps to root."""
    privileged = os.geteuid() == 0
    uid_gid = (os.geteuid(), os.getegid())
    if privileged:
        sys_.unshare(sys_.CLONE_NEWNS)
        root.build(python_paths)
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)
        uid_gid = (uid, uid)
    sys_.prctl(sys_.PR_SET_DUMPABLE, 1)
    sys_.unshare(_NAMESPACES)
    proc = os.open("/proc", os.O_PATH | os.O_CLOEXEC)
    write_id_maps(proc, JAIL_ID, *uid_gid)
    os.close(proc)
    if not privileged:
        root.build(python_paths)


def _enter_process_namespace(sockets: tuple[socket.socket, ...]) -> int:
    """Go on as process 1 of a process namespace: only one that our user namespace owns may be returned to by `setns`.

    Returns 0 there. The process outside waits for it and returns its exit status; each dies with the other.
    """
    sys_.unshare(sys_.CLONE_NEWPID)
    pid = os.fork()
    if pid == 0:
        sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
        return 0
    for sock in sockets:
        sock.close()
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) or 255


def _children() -> list[int]:
    """Processes whose parent we are, zombies included."""
    fd = os.open("/proc/thread-self/children", os.O_RDONLY | os.O_CLOEXEC)
    try:
        text = b""
        while chunk := os.read(fd, 1 << 16):
            text += chunk
        return [int(pid) for pid in text.split()]
    finally:
        os.close(fd)


def _owner(pid: int) -> int:
    """Effective user id of a process, zombie or not; -1 when it is gone."""
    try:
        return os.stat(f"/proc/{pid}").st_uid  # noqa: PTH116
    except OSError:
        return -1


class Warden:
    """Serves the supervisor until its socket closes."""

    def __init__(self, control: socket.socket, tier: Tier, zygote: int, work_root: str) -> None:
        self.work_root = work_root
        self.control = control
        self.tier = tier
        self.zygote = zygote
        self.inits: dict[int, int] = {}  # pidfd -> pid
        self.uids: set[int] = set()
        self.own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC) if tier.namespaces else -1
        self.poller = select.poll()
        self.poller.register(control, select.POLLIN)

    def serve(self) -> None:
        """The loop; afterwards nothing of the unit is left."""
        while True:
            for fd, _ in self.poller.poll(1000):
                if fd in self.inits:
                    self.poller.unregister(fd)
                    os.waitpid(self.inits.pop(fd), 0)
                    os.close(fd)
                elif not self._command():
                    self._end()
                    return
            if not self.tier.namespaces:
                self._reap_orphans()

    def _reap_orphans(self) -> None:
        try:
            while os.waitpid(-1, os.WNOHANG)[0] > 0:
                pass
        except ChildProcessError:
            pass

    def _command(self) -> bool:
        packet = wire.receive_packet(self.control)
        if packet is None:
            return False
        kind, ident, numbers, fds = packet
        try:
            if kind == wire.INIT:
                wire.send_packet(
                    self.control, wire.INIT, ident, (), (self._make_init(socket.socket(fileno=fds.pop())),)
                )
            elif kind == wire.PURGE:
                wire.send_packet(self.control, wire.PURGE, ident, (int(self.purge(numbers[0])),))
        except OSError as error:
            wire.send_packet(self.control, wire.FAILED, ident, (error.errno or 0,))
        return True

    def _make_init(self, control: socket.socket) -> int:
        """A new process namespace with its init, which obeys `control`; returns the init's pidfd."""
        sys_.unshare(sys_.CLONE_NEWPID)
        try:
            pid = os.fork()
            if pid == 0:
                init.serve(control)
        finally:
            sys_.setns(self.own_pids, sys_.CLONE_NEWPID)
            control.close()
        pidfd = os.pidfd_open(pid)
        self.inits[pidfd] = pid
        self.poller.register(pidfd, select.POLLIN)
        return pidfd

    def purge(self, uid: int) -> bool:
        """Kill everything of a run; True when nothing is left, zombies included (they count as processes).

        The run's first process is dead, so whatever else lives has an ancestor that was given to us as the subreaper.
        """
        if self.tier.own_uid:
            self.uids.add(uid)
        for attempt in range(200):
            if self.tier.own_uid:
                _kill_as(uid)
            self._reap_orphans()
            orphans = [pid for pid in _children() if pid != self.zygote and (not uid or _owner(pid) == uid)]
            if not orphans:
                return True
            if not self.tier.own_uid:
                for pid in orphans:
                    os.kill(pid, signal.SIGKILL)
            _wait_for(orphans[0], min(1 + attempt, 20))
        return False

    def _end(self) -> None:
        """The supervisor is gone: kill the zygote and whatever ran. Namespaces die with this process's children."""
        try:
            os.kill(self.zygote, signal.SIGKILL)
            os.waitpid(self.zygote, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        if not self.tier.namespaces:
            for uid in self.uids if self.tier.own_uid else {0}:
                self.purge(uid)
            self._remove_folders()

    def _remove_folders(self) -> None:
        """What runs left in their work folders, which may be beyond the rights of whoever removes `work_root`."""
        from sandbox.supervisor import folders

        for entry in Path(self.work_root).iterdir():
            if entry.name.isdigit():
                folders.remove(str(entry), entry.lstat().st_uid if self.tier.own_uid else 0)


def _wait_for(pid: int, patience_ms: int) -> None:
    """Until that child of ours has ended; what it held in memory may take the kernel some milliseconds."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        poller = select.poll()
        poller.register(fd, select.POLLIN)
        poller.poll(patience_ms)
    finally:
        os.close(fd)


def _kill_as(uid: int) -> None:
    """`kill(-1)` with the run's effective user id: atomic against fork bombs.

    Our real id is then one that the run cannot signal; the saved id, root's, is the way back.
    """
    if uid <= 0:
        raise ValueError(f"{uid} is no run's user id: this would kill everything on the machine")
    os.setresuid(uid + 1, uid, 0)
    try:
        with contextlib.suppress(ProcessLookupError):
            os.kill(-1, signal.SIGKILL)
    finally:
        os.setresuid(0, 0, 0)


def main(config: dict[str, Any]) -> int:
    """Run a unit. `config`: tier, profile, python_paths, module_paths, uid, tmp_mb, work_root, numbers of
    two sockets."""
    control = socket.socket(fileno=config["warden_fd"])
    zygote_control = socket.socket(fileno=config["zygote_fd"])
    tier = BY_NAME[config["tier"]]
    python_paths = tuple(config["python_paths"])
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.pop("LD_BIND_NOW", None)  # was for the loader of this process; nothing for what code starts
    try:
        sys_.name_process("sandbox-warden")
        if tier.namespaces:
            enter_namespaces(python_paths, config["uid"])
        else:
            sys_.prctl(sys_.PR_SET_CHILD_SUBREAPER, 1)
            if tier.own_uid:  # each run makes its own folder here, sees no other and removes none
                Path(config["work_root"]).chmod(0o1733)
        if tier.landlock:
            landlock.require()
    except OSError as error:
        print(json.dumps({"step": str(error)}), file=sys.stderr, flush=True)
        return 3
    jail = Jail(tier, readable_paths(tier, python_paths), config["tmp_mb"], config["work_root"])
    if tier.namespaces and (outer := _enter_process_namespace((control, zygote_control))):
        return outer
    pid = os.fork()
    if pid == 0:
        control.close()
        _zygote(zygote_control, jail, config)
    zygote_control.close()
    os.set_inheritable(control.fileno(), False)
    Warden(control, tier, pid, config["work_root"]).serve()
    return 0


def _zygote(control: socket.socket, jail: Jail, config: dict[str, Any]) -> NoReturn:
    try:
        sys_.name_process("sandbox-zygote")
        sys_.prctl(sys_.PR_SET_PDEATHSIG, signal.SIGKILL)
        sys.path[:] = [*sys.path, *(path for path in config["module_paths"] if path not in sys.path)]
        stand = warm(PROFILES[config["profile"]])
        base = address_space()
        wire.send_packet(control, wire.READY, 0, (base, int(Path("/proc/self").readlink().name), threads()))
        Zygote(control, jail, base, stand).serve()
    except BaseException as error:
        print(json.dumps({"step": f"warming up: {type(error).__name__}: {error}"}), file=sys.stderr, flush=True)
    finally:
        os._exit(4)
