"""The zygote: a warm interpreter that forks one confined child per command. It never sees user bytes.

Commands and answers are fixed-size packets (`sandbox/wire.py`). One thread, one loop: commands in, wait statuses out.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import linecache
import os
import select
import socket
import sys
import time
import types

from sandbox import wire
from sandbox.linux import seccomp
from sandbox.linux import syscalls as sys_
from sandbox.profiles import Profile
from sandbox.worker import branch, runner, stage
from sandbox.worker.anchor import Anchor
from sandbox.worker.jail import JOB, REPORT, Confinement, Jail
from sandbox.worker.memory import collapse_heap, fill_heap, fill_pools


def warm(profile: Profile) -> stage.Stand:
    """Import and exercise the profile's modules, then freeze the heap so that forks share it.

    Returns what every program will stand on.
    Raises `ImportError` when a module is missing.
    """
    sys.modules.update(dict.fromkeys(profile.without))  # type: ignore[arg-type]  # None: cannot be imported now
    for name in profile.modules:
        importlib.import_module(name)
    exec(compile(profile.warmup, "warmup", "exec"), {"__name__": "warmup"})
    for name in profile.without:
        del sys.modules[name]
    _hidden.extend(runner.rehearse())
    atexit._clear()  # what the modules registered is nothing that a run's end needs
    if sys.version_info < (3, 12):
        sys._clear_type_cache()  # it counts its references to names, which lie anywhere
    gc.disable()
    _fill()
    stand = stage.set_up()
    for _ in range(_REHEARSALS):
        runner.prepare(stand)
    linecache.clearcache()
    branch.watch_handlers()
    _fill()
    gc.freeze()
    collapse_heap()
    return stand


def _fill() -> None:
    """Let what comes from now on lie together, away from what has been there before."""
    for _ in range(_FILLINGS):
        gc.collect()  # lists of free objects as well, which lie anywhere
        _kept.extend(fill_pools())
    _kept.append(slice(0))  # the one that the interpreter keeps for next time
    fill_heap()


_kept: list[object] = []
_hidden: list[types.ModuleType] = []  # our own modules, alive but no longer importable by user code
_STRANGERS_S = 0.2
_FILLINGS = 3  # each leaves some garbage of its own
_REHEARSALS = 16  # the interpreter optimises what it has run eight times


class Zygote:
    """Forks children and reports how they ended."""

    def __init__(self, control: socket.socket, jail: Jail, base_bytes: int, stand: stage.Stand) -> None:
        self.control = control
        self.jail = jail
        self.base_bytes = base_bytes
        self.stand = stand
        self.confinement = Confinement(jail)
        self.anchor = None if jail.tier.deny_fork else Anchor(REPORT)
        self.children: dict[int, tuple[int, int]] = {}  # pidfd -> (id, pid)
        self.poller = select.poll()
        self.poller.register(control, select.POLLIN)
        if jail.tier.seccomp:
            seccomp.prepare(stage.CPU_LIMIT_LOCK)
            socket.socket.sendmsg = stage.sendmsg  # type: ignore[assignment, method-assign]
        if jail.tier.namespaces:
            stage.set_home(jail.workdir(0))
        self.own_pids = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC) if jail.tier.namespaces else -1

    def serve(self) -> None:
        """Until the supervisor closes its end."""
        looked = 0.0
        while True:
            for fd, _ in self.poller.poll(1e3 * _STRANGERS_S):
                if fd in self.children:
                    self._reap(fd)
                elif not self._command():
                    return
            if time.monotonic() - looked > _STRANGERS_S:
                looked = time.monotonic()
                self._reap_strangers()

    def _command(self) -> bool:
        packet = wire.receive_packet(self.control)
        if packet is None:
            return False
        kind, ident, numbers, fds = packet
        if kind == wire.SPAWN:
            try:
                pid = self._fork(ident, numbers, fds)
                pidfd = os.pidfd_open(pid)
                self.children[pidfd] = (ident, pid)
                self.poller.register(pidfd, select.POLLIN)
                wire.send_packet(self.control, wire.SPAWNED, ident, (pid,), (pidfd,))
            except OSError as error:
                wire.send_packet(self.control, wire.FAILED, ident, (error.errno or 0,))
        elif kind == wire.ADOPT and fds:
            pidfd = fds.pop()
            self.children[pidfd] = (ident, 0)
            self.poller.register(pidfd, select.POLLIN)
        for fd in fds:
            os.close(fd)
        return True

    def _fork(self, ident: int, numbers: tuple[int, ...], fds: list[int]) -> int:
        uid, joins = numbers[:2]
        self.confinement.aim(ident, uid, fds, fds[-1] if joins else -1)
        if not self.jail.tier.namespaces:
            pid = sys_.fork()
            if pid == 0:
                self._child(ident)
            return pid
        sys_.setns(fds[4], sys_.CLONE_NEWPID)
        try:
            pid = sys_.fork()
            if pid == 0:
                self._child(ident)
        finally:
            sys_.setns(self.own_pids, sys_.CLONE_NEWPID)
        return pid

    def _child(self, ident: int) -> None:
        """In the child: confine, say so, wait for a job, run it. Never returns."""
        try:
            self.confinement.apply()
            if not self.jail.tier.namespaces:
                stage.set_home(self.jail.workdir(ident))
            runner.prepare(self.stand)
            if self.anchor:
                self.anchor.rehearse()
            os.write(REPORT, runner.READY_BYTE)
            runner.run(self.stand, JOB, REPORT, self.base_bytes, self.jail.tier.seccomp, self.anchor)
        except OSError as error:
            # Before the job arrived this is our failure; the supervisor reads it where it expects readiness.
            os.write(REPORT, f"F{error}".encode())
        except BaseException as error:
            os.write(REPORT, f"F{type(error).__name__}: {error}".encode())
        finally:
            os._exit(125)

    def _reap(self, pidfd: int) -> None:
        ident, pid = self.children.pop(pidfd)
        try:
            if not pid:
                found = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOWAIT)
                pid = found.si_pid if found else 0
            _, status, usage = os.wait4(pid, 0)
            numbers = (status, int((usage.ru_utime + usage.ru_stime) * 1e6), usage.ru_maxrss)
        except ChildProcessError:  # an adopted process that had ended too early, or was never ours
            numbers = (wire.UNKNOWN_STATUS, 0, 0)
        wire.send_packet(self.control, wire.EXITED, ident, numbers)  # first: somebody waits for it
        self.poller.unregister(pidfd)
        os.close(pidfd)

    def _reap_strangers(self) -> None:
        """User code can make processes our children (CLONE_PARENT). Their zombies would count against its user id."""
        try:
            while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
                if any(fd in self.children for fd, _ in self.poller.poll(0)):
                    return  # perhaps one that we know: its turn comes first
                os.waitpid(ended.si_pid, 0)
        except ChildProcessError:
            pass
