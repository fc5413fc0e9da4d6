"""The process group over which weights get from the learner (rank 0) to the workers of one vLLM server (rank 1 and up).

It stands outside torch's default group, over a store that the learner serves. Every server has a group of its own, so
that one which dies takes no other along. The workers say hello first, or why they may not take part; nobody enters a
collective operation before all have come. Whoever finds the other end gone gets `WireError`, and the group is of no
use any more.

Runs in the learner's and in vLLM's interpreter and imports torch only.
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .weight_wire import Entry, WireError, WireRefused, first_line, import_bucket, layout, unpack, wire_errors

JOIN_S = 30.0  # for what takes no time between two ends that are there
_LOOK_S = 0.2
_GREETING = 0x5A


def address_towards(host: str) -> str:
    """Which of this machine's addresses `host` sees. Raises `WireError` for a name that nobody knows."""
    try:
        family, kind, proto, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind, proto) as probe:
            probe.connect(target)  # sends nothing
            return str(probe.getsockname()[0])
    except OSError as error:
        raise WireError(f"no way to {host}: {error.strerror or error}") from None


def serve_store(host: str, port: int = 0) -> dist.TCPStore:
    """A store of this process, at that address only. Raises `WireError`."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family)
    except OSError as error:
        raise WireError(f"cannot listen at {host}:{port}: {error.strerror or error}") from None
    port, fd = listener.getsockname()[1], listener.detach()
    limit = timedelta(seconds=JOIN_S)
    with wire_errors():
        return dist.TCPStore(host, port, is_master=True, timeout=limit, wait_for_workers=False, master_listen_fd=fd)


def reach_store(host: str, port: int, seconds: float = JOIN_S) -> dist.TCPStore:
    """A connection of its own to a store. Raises `WireError` when nobody answers there."""
    try:
        return dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds), wait_for_workers=False)
    except RuntimeError as error:
        raise WireError(f"nobody answers at {host}:{port} ({first_line(error)})") from None


class Group:
    """A process group over `store` that broadcasts buckets. `device`: where buckets lie (a CPU for gloo). `host`: the
    address of this end that the others can reach (gloo; NCCL finds its own). Raises `WireError`."""

    def __init__(
        self, backend: str, store: dist.Store, rank: int, size: int, device: torch.device, host: str, seconds: float
    ) -> None:
        self.backend, self.device, self.seconds = backend, device, seconds
        with wire_errors():
            made = (_gloo if backend == "gloo" else _nccl)(store, rank, size, host, timedelta(seconds=seconds))
        self._held = [made]
        self._release = weakref.finalize(self, _let_go, self._held, backend)  # also at the end of the process

    def broadcast(self, buffer: Tensor, look: Callable[[], None]) -> None:
        """From rank 0 to all others; blocks. `look` is called now and then and may raise. Raises `WireError`."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor, options.asyncOp = 0, 0, True
        options.timeout = timedelta(seconds=self.seconds)
        held = list(self._held)
        if not held:
            raise WireError("the group was closed")
        with wire_errors():
            work = held[0].broadcast([buffer], options)
            now = time.monotonic()
            end, next_look = now + self.seconds, now + _LOOK_S
            while not work.is_completed():
                now = time.monotonic()
                if now > end:
                    raise WireError(f"{buffer.numel()} bytes did not get through within {self.seconds:g} s")
                if now > next_look:
                    look()
                    next_look = now + _LOOK_S
                time.sleep(0.0005)
            work.wait()

    def close(self) -> None:
        """Leave it, whatever is still under way; idempotent."""
        self._release()


def _gloo(store: dist.Store, rank: int, size: int, host: str, timeout: timedelta) -> Any:
    options = dist.ProcessGroupGloo._Options()
    options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
    options._threads = 1
    options._timeout = timeout
    return dist.ProcessGroupGloo(store, rank, size, options)


def _nccl(store: dist.Store, rank: int, size: int, host: str, timeout: timedelta) -> Any:
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = timeout
    # its watchdog would end the process when the other end dies; here that is what `broadcast` notices
    key = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
    before = os.environ.get(key)
    os.environ[key] = "0"
    try:
        return dist.ProcessGroupNCCL(store, rank, size, options)
    finally:
        if before is None:
            del os.environ[key]
        else:
            os.environ[key] = before


def _let_go(held: list[Any], backend: str) -> None:
    """A broadcast that hangs holds gloo's group until its time is over: nobody waits for that."""

    def release() -> None:
        while held:
            made = held.pop()
            if backend == "nccl":
                made.abort()
            del made

    thread = threading.Thread(target=release, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # the process is ending: no more threads
        release()
    else:
        thread.join(1.0)


@dataclass(frozen=True)
class Invitation:
    """What the learner tells a server's workers. `run`: of the learner; `key`: of the group; `size`: ranks, the learner
    among them; `seconds`: longest time of one broadcast; `nccl`, `gpu`: the learner's version of NCCL and the identity
    of its GPU, where that counts."""

    backend: str
    run: str
    key: str
    host: str
    port: int
    size: int
    seconds: float
    nccl: str
    gpu: str

    @classmethod
    def read(cls, told: Mapping[str, Any]) -> Invitation:
        """Raises `WireError`."""
        try:
            made = cls(**told)
            if made.backend in ("gloo", "nccl", "ipc") and made.size > 1:
                return made
        except TypeError:
            pass
        raise WireError(f"no invitation to a group: {str(told)[:200]}")

    def told(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)


def nccl_version() -> str:
    """`2.27.5`; empty where there is none."""
    return ".".join(map(str, torch.cuda.nccl.version())) if torch.cuda.is_available() else ""


def gpu_of(device: torch.device) -> str:
    """The identity of a GPU, the same in every process; empty for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.type == "cuda" else ""


def welcome(invitation: Invitation, device: torch.device, look: Callable[[], None]) -> tuple[dist.Store, Group]:
    """The learner's end: blocks until all workers have come. Raises `WireRefused` with what a worker says, `WireError`
    when they do not come."""
    store = dist.PrefixStore(invitation.key, reach_store(invitation.host, invitation.port))
    try:
        with wire_errors():
            _gather(store, invitation, look)
            store.set("go", "1")
            seconds = min(invitation.seconds, JOIN_S)
            group = Group(invitation.backend, store, 0, invitation.size, device, invitation.host, seconds)
            group.broadcast(torch.full((1,), _GREETING, dtype=torch.uint8, device=device), look)
    except BaseException:
        store.set("stop", "1")
        raise
    group.seconds = invitation.seconds
    return store, group


def _gather(store: dist.Store, invitation: Invitation, look: Callable[[], None]) -> None:
    """Until all workers have said hello."""
    missing = set(range(1, invitation.size))
    end = time.monotonic() + JOIN_S
    while missing:
        look()
        for rank in sorted(missing):
            if store.check([f"hello/{rank}"]):
                missing.discard(rank)
                refused = json.loads(store.get(f"hello/{rank}"))
                if refused:
                    raise WireRefused(refused)
        if missing and time.monotonic() > end:
            raise WireError(
                f"its workers did not come to {invitation.host}:{invitation.port} within {JOIN_S:g} s; "
                "engine.sync_host must be an address of this machine that they can reach"
            )
        time.sleep(0.01)


class Receiver:
    """A worker's end. `rank`: among the server's workers, from 0; `device`: of its model; `busy`: why it cannot take
    part now, if it cannot. Raises `WireError`."""

    def __init__(self, invitation: Invitation, rank: int, device: torch.device, busy: str = "") -> None:
        self.invitation, self.device = invitation, device
        self._group: Group | None = None
        self._store: dist.Store | None = None
        refused = busy or self._misfit()
        if invitation.backend == "ipc":
            if refused:
                raise WireRefused(refused)
            return
        with wire_errors():
            self._store = dist.PrefixStore(invitation.key, reach_store(invitation.host, invitation.port))
            self._store.set(f"hello/{rank + 1}", json.dumps(refused))
            if refused:
                raise WireRefused(refused)
            self._group = self._enter(self._store, rank + 1)

    def _enter(self, store: dist.Store, rank: int) -> Group:
        """When everybody is there."""
        theirs, end = self.invitation, time.monotonic() + JOIN_S
        while not store.check(["go"]):
            self._look()
            if time.monotonic() > end:
                raise WireError(f"the learner did not begin within {JOIN_S:g} s")
            time.sleep(0.01)
        wire = self.device if theirs.backend == "nccl" else torch.device("cpu")
        host = address_towards(theirs.host)
        group = Group(theirs.backend, store, rank, theirs.size, wire, host, min(theirs.seconds, JOIN_S))
        greeting = torch.zeros(1, dtype=torch.uint8, device=wire)
        group.broadcast(greeting, self._look)
        if int(greeting) != _GREETING:
            raise WireError("what the learner sends does not arrive")
        group.seconds = theirs.seconds
        return group

    def alive(self) -> bool:
        """Whether the learner still holds the group."""
        try:
            return self._store is not None and not self._store.check(["stop"])
        except RuntimeError:
            return False

    def receive(self, told: Mapping[str, Any]) -> list[tuple[str, Tensor]]:
        """The tensors of the bucket that a request announces. Raises `WireError`; the group is of no use then."""
        if told.get("key") != self.invitation.key:
            raise WireError("the weights come over a group that this worker is not in")
        entries = [Entry.read(e) for e in told["tensors"]]
        _, size = layout(entries)
        if told["bytes"] != size:
            raise WireError(f"the learner announces {told['bytes']} bytes for tensors of {size}")
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device if self._group is None else self._group.device)
        if size and self._group is not None:
            self._group.broadcast(buffer, self._look)
        elif size:
            buffer = import_bucket(told.get("handle"), self.device)
        return unpack(buffer, entries)

    def close(self) -> None:
        """Idempotent."""
        if self._group is not None:
            self._group.close()

    def _look(self) -> None:
        if not self.alive():
            raise WireError("the learner has left the group")

    def _misfit(self) -> str:
        """Why this worker and the learner cannot exchange anything; empty: they can."""
        theirs, gpu = self.invitation, gpu_of(self.device)
        if theirs.backend == "nccl" and gpu == theirs.gpu:
            return f"this worker is on the learner's own GPU ({gpu}), where NCCL has no way between them"
        if theirs.backend == "nccl" and nccl_version() != theirs.nccl:
            return f"the learner has NCCL {theirs.nccl}, this worker {nccl_version() or 'none'}; they must be the same"
        if theirs.backend == "ipc" and (gpu != theirs.gpu or theirs.size != 2):
            return f"ipc needs a server of one worker on the learner's GPU {theirs.gpu}; this one has {gpu or 'none'}"
        return ""
