"""A learner and workers in processes of their own, over gloo: everything arrives, and whoever finds the other end gone,
late or unwilling hears of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from retool.engines import weight_group
from retool.engines.weight_group import Group, Invitation, Receiver, address_towards, serve_store, welcome
from retool.engines.weight_wire import Entry, WireError, WireRefused, buckets, layout, pack
from tests.engines.group_worker import hexed
from tests.engines.test_weight_wire import TYPES, tensor

CPU = torch.device("cpu")
REPO = Path(__file__).parents[2]


class Worker:
    """A process that runs group_worker.py."""

    def __init__(self, invitation: Invitation, rank: int = 0, busy: str = "") -> None:
        command = [sys.executable, "-m", "tests.engines.group_worker"]
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=REPO, env=env
        )
        self.tell(invitation=invitation.told(), rank=rank, busy=busy)

    def tell(self, **what: Any) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(what).encode() + b"\n")
        self.process.stdin.flush()

    def said(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line, "the worker ended without a word"
        return dict(json.loads(line))

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with suppress(BrokenPipeError):
                pipe.close()


class Learner:
    """The other end, with its workers."""

    def __init__(self, size: int = 2, seconds: float = 60.0, **changes: Any) -> None:
        self.store = serve_store("127.0.0.1")
        given = {"backend": "gloo", "run": "r", "key": "k", "host": "127.0.0.1", "port": self.store.port}
        given |= {"size": size, "seconds": seconds, "nccl": "", "gpu": ""}
        self.invitation = Invitation(**{**given, **changes})
        self.workers: list[Worker] = []
        self.held: dist.Store | None = None
        self.group: Group | None = None

    def join(self, busy: str = "") -> None:
        self.workers = [Worker(self.invitation, rank, busy) for rank in range(self.invitation.size - 1)]
        self.held, self.group = welcome(self.invitation, CPU, _nothing)
        assert all(w.said() == {"joined": True} for w in self.workers)

    def announce(self, entries: list[Entry], **changes: Any) -> None:
        told = {"key": self.invitation.key, "bytes": layout(entries)[1]}
        told["tensors"] = [[e.name, e.dtype, list(e.shape)] for e in entries]
        for worker in self.workers:
            worker.tell(**{**told, **changes})

    def send(self, tensors: dict[str, torch.Tensor]) -> list[dict[str, Any]]:
        """One bucket, and what the workers say they got."""
        entries = [Entry.of(name, t) for name, t in tensors.items()]
        self.announce(entries)
        assert self.group is not None
        self.group.broadcast(pack(entries, list(tensors.values()), CPU), _nothing)
        return [w.said() for w in self.workers]


def _nothing() -> None:
    pass


@contextmanager
def learner(**given: Any) -> Iterator[Learner]:
    made = Learner(**given)
    try:
        yield made
    finally:
        for worker in made.workers:
            worker.end()
        if made.group is not None:
            made.group.close()


SOME = {"w": torch.arange(6.0).view(2, 3)}
BIG = 1 << 27  # bytes, more than sockets hold


def test_two_workers_get_every_type_and_shape_over_many_buckets() -> None:
    shapes = [(), (0,), (1,), (7, 3), (5, 0, 2), (2, 3, 5), (1001,)]
    everything = {f"{d}{s}": tensor(d, s, i) for i, d in enumerate(TYPES) for s in shapes}
    names, entries = list(everything), [Entry.of(n, t) for n, t in everything.items()]
    groups = list(buckets(entries, 1500))  # smaller than the largest tensors
    assert len(groups) >= 16 and max(layout([e])[1] for e in entries) > 1500
    got: list[dict[str, Any]] = [{}, {}]
    with learner(size=3) as sender:
        sender.join()
        for group in groups:
            for sum_, said in zip(got, sender.send({names[i]: everything[names[i]] for i in group}), strict=True):
                sum_.update(said["got"])
    sent = {name: [str(t.dtype), list(t.shape), hexed(t)] for name, t in everything.items()}
    assert got == [sent, sent]


def test_two_groups_in_one_learner_know_nothing_of_each_other() -> None:
    with learner() as a, learner() as b:
        a.join()
        b.join()
        assert a.group is not None
        a.workers[0].process.kill()
        with pytest.raises(WireError):
            a.group.broadcast(torch.zeros(BIG, dtype=torch.uint8), _nothing)
        ((_, shape, _),) = b.send(SOME)[0]["got"].values()
        assert shape == [2, 3]


@pytest.mark.parametrize("when", ["before", "amid"])
def test_a_killed_worker_is_noticed_at_once(when: str) -> None:
    with learner(seconds=300) as sender:
        sender.join()
        assert sender.group is not None
        (worker,) = sender.workers
        if when == "amid":
            threading.Timer(0.5, worker.process.kill).start()
        else:
            worker.end()
        with pytest.raises(WireError, match=r"(?i)connection"):  # it never reads: the broadcast cannot end by itself
            sender.group.broadcast(torch.zeros(BIG, dtype=torch.uint8), _nothing)


def test_a_worker_that_stands_still_is_given_up() -> None:
    with learner(seconds=1.5) as sender:
        sender.join()
        assert sender.group is not None
        os.kill(sender.workers[0].process.pid, signal.SIGSTOP)
        with pytest.raises(WireError, match=r"(?i)did not get through within|timed out"):
            sender.group.broadcast(torch.zeros(BIG, dtype=torch.uint8), _nothing)
        sender.group.close()
        with pytest.raises(WireError, match="closed"):
            sender.group.broadcast(torch.zeros(1, dtype=torch.uint8), _nothing)


def test_whoever_looks_may_end_a_broadcast() -> None:
    def enough() -> None:
        raise WireError("enough")

    with learner(seconds=300) as sender:
        sender.join()
        assert sender.group is not None
        with pytest.raises(WireError, match="enough"):
            sender.group.broadcast(torch.zeros(BIG, dtype=torch.uint8), enough)


@pytest.mark.parametrize("how", ["stop", "gone"])
def test_a_worker_does_not_wait_for_a_learner_that_left(how: str) -> None:
    with learner(seconds=300) as sender:
        sender.join()
        assert sender.group is not None and sender.held is not None
        sender.announce([Entry.of("w", torch.zeros(3))])  # and no broadcast
        if how == "stop":
            sender.held.set("stop", b"1")
        else:
            sender.group.close()
        error = sender.workers[0].said()["error"]
        assert "learner has left" in error if how == "stop" else error


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"key": "other"}, "not in"),
        ({"bytes": 64 + 1}, "announces 65 bytes for tensors of 64"),
        ({"tensors": [["w", "float32", [99]]]}, "announces 64 bytes for tensors of 448"),
        ({"tensors": [["w", "float32", [-1]]]}, "name, type and shape"),
    ],
)
def test_an_announcement_that_does_not_fit_is_refused_before_anything_is_received(
    changes: dict[str, Any], match: str
) -> None:
    with learner() as sender:
        sender.join()
        sender.announce([Entry.of("w", SOME["w"])], **changes)
        assert match in sender.workers[0].said()["error"]


@pytest.mark.parametrize(
    ("changes", "busy", "match"),
    [
        ({}, "another run has it", "another run has it"),
        ({"backend": "nccl", "gpu": ""}, "", "NCCL has no way"),
        ({"backend": "nccl", "nccl": "2.99.1", "gpu": "GPU-1"}, "", r"learner has NCCL 2\.99\.1, this worker none"),
    ],
)
def test_a_worker_that_may_not_take_part_says_why(changes: dict[str, Any], busy: str, match: str) -> None:
    with learner(size=3, **changes) as sender:
        with pytest.raises(WireRefused, match=match):
            sender.join(busy)
        said = [w.said()["error"] for w in sender.workers]  # nobody waits for a group that will not be
        assert any(match.replace("\\", "") in s for s in said) and len(said) == 2


def test_ipc_needs_the_learners_gpu() -> None:
    told = Invitation("ipc", "r", "k", "", 0, 2, 1.0, "", "GPU-1")
    with pytest.raises(WireRefused, match="learner's GPU GPU-1; this one has none"):
        Receiver(told, 0, CPU)


def test_workers_that_do_not_come_are_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weight_group, "JOIN_S", 0.5)
    with learner() as sender, pytest.raises(WireError, match=r"did not come to 127\.0\.0\.1.*engine\.sync_host"):
        welcome(sender.invitation, CPU, _nothing)


def test_nobody_at_the_address() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(WireError, match=f"cannot listen at 127.0.0.1:{port}"):
            serve_store("127.0.0.1", port)
    with pytest.raises(WireError, match="cannot listen at"):
        serve_store("192.0.2.1")  # of no machine
    with pytest.raises(WireError, match=f"nobody answers at 127.0.0.1:{port}"):
        weight_group.reach_store("127.0.0.1", port, 0.5)
    assert address_towards("127.0.0.1") == "127.0.0.1"
    with pytest.raises(WireError, match="no way to"):
        address_towards("no-such-host.invalid")


@pytest.mark.parametrize("changes", [{"backend": "mpi"}, {"size": 1}, {"more": 1}, {"host2": "h"}])
def test_what_is_no_invitation_is_refused(changes: dict[str, Any]) -> None:
    told = Invitation("gloo", "r", "k", "h", 1, 2, 1.0, "", "").told()
    assert Invitation.read(told).told() == told
    with pytest.raises(WireError, match="no invitation"):
        Invitation.read({**told, **changes})


def test_a_process_that_forgets_to_close_ends_well() -> None:
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from tests.engines.test_weight_group import *\n"
        "keep = Learner(); keep.join(); keep.send(SOME)\n"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", program], cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
