"""Sessions whose code has got at its own runner: what they say and do is their own end at most, never our failure."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytest_asyncio

from sandbox import Limits, LocalSandbox, SessionError, Status
from sandbox.supervisor import sessions_live
from sandbox.supervisor.admission import Admission as Slots
from sandbox.supervisor.sessions_interpreter import Interpreter
from sandbox.supervisor.sessions_live import Admission, LiveSession, Request
from sandbox.supervisor.unit import Child
from sandbox.wire import UNKNOWN_STATUS
from sandbox.worker.channel import DONE, EXEC, FRAME
from tests.sandbox.test_sessions import refused
from tests.sandbox.test_sessions_fork import said

pytestmark = pytest.mark.asyncio(loop_scope="module")

RUNNER = """
import os, sys, time
frame = sys._getframe()
while type(frame.f_locals.get("self")).__name__ != "Interpreter": frame = frame.f_back
runner = frame.f_locals["self"]
modules = type(runner).execute.__globals__
del frame
"""
"""What hostile code begins with."""


@pytest_asyncio.fixture(autouse=True, loop_scope="module")
async def blameless(box: LocalSandbox) -> AsyncIterator[None]:
    """Nothing here may count as our failure."""
    before = (await box.stats()).get("infra_errors", 0)
    yield
    assert (await box.stats()).get("infra_errors", 0) == before


# --- kills --------------------------------------------------------------------------------------------------------


def running(name: str) -> int:
    """How many processes call themselves `name`."""
    count = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            count += f"({name}) " in (text := path.read_text()) and not text.rsplit(") ", 1)[1].startswith("Z")
    return count


async def test_a_copy_without_a_process_group_of_its_own_is_refused(box: LocalSandbox) -> None:
    """A kill of its group would miss it, and one of its original's group would hit it."""
    async with box.session() as session:
        await said(session, "import os\nkept = os.setsid\nos.setsid = lambda: None")
        assert "group" in str(await refused("fork_unsafe", session.fork()))
        await refused("fork_unsafe", session.snapshot())
        await said(session, "os.setsid = kept")
        await session.fork()


async def test_a_copy_that_is_refused_is_killed(box: LocalSandbox) -> None:
    name = "a-refused-copy"
    lingering = "def stay(received, *_):\n  os.write(received[0], b'I')\n  time.sleep(99)\nrunner._become_copy = stay\n"
    async with box.session() as session:
        rename = f"import ctypes; ctypes.CDLL(None).prctl(15, b'{name}')"
        await said(session, RUNNER + lingering + rename)
        assert running(name) == 1
        await refused("fork_unsafe", session.fork())
        for _ in range(200):
            if running(name) == 1:
                break
            await asyncio.sleep(0.02)
        assert running(name) == 1


@contextlib.asynccontextmanager
async def interpreter(pid: int = 0) -> AsyncIterator[tuple[Interpreter, int, int]]:
    """The supervisor's end of an interpreter that is us: it, where its standard output and its report are written."""
    job, far = socket.socketpair()
    (out, to_out), (err, to_err), (report, to_report) = (os.pipe() for _ in range(3))
    for fd in (out, err, report, job.fileno()):
        os.set_blocking(fd, False)
    child = Child(0, job.detach(), out, err, report, process=os.pidfd_open(pid) if pid else -1)
    made = Interpreter(child, pid)
    with far:
        yield made, to_out, to_report
    made.detach()
    child.close()
    for fd in (to_out, to_err, to_report):
        os.close(fd)


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process in our own group."""
    with subprocess.Popen(["/bin/sleep", "60"]) as process:
        yield process
        process.kill()


async def test_a_kill_reaches_a_process_that_leads_no_group(sleeper: subprocess.Popen[bytes]) -> None:
    async with interpreter(sleeper.pid) as (made, _, _):
        made.kill()
        assert await asyncio.to_thread(sleeper.wait, 10) == -signal.SIGKILL


def alive(made: Interpreter, slots: Slots, copied: bool) -> LiveSession:
    """A session that has this interpreter."""
    unit = SimpleNamespace(settings=SimpleNamespace(profile="py-bare"), tier=SimpleNamespace(name="ns"))
    tree: Any = SimpleNamespace(
        limits=Limits(), unit=unit, processes=1, copied=copied, root=SimpleNamespace(group=None), allow=lambda *_: True
    )
    counts: Counter[str] = Counter()
    return LiveSession("", tree, made, 0, Admission(slots, lambda name: counts.update([name])))


async def test_nobody_waits_for_a_process_that_does_not_end(
    monkeypatch: pytest.MonkeyPatch, sleeper: subprocess.Popen[bytes]
) -> None:
    monkeypatch.setattr(sessions_live, "GRACE_S", 0.05)
    monkeypatch.setattr(sessions_live, "END_S", 0.2, raising=False)
    async with interpreter(sleeper.pid) as (made, _, _):
        slots = Slots(1, 1)
        session = alive(made, slots, copied=False)
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        session.execute(Request("1", "", Limits(wall_s=0.1)), None, reply.set_result)
        assert slots.free == 0
        async with asyncio.timeout(10):
            result = (await reply)["result"]
        assert (result["status"], result["alive"], slots.free) == ("timeout", False, 1)
        assert session.ended and session.running is None


# --- what a session says about itself -----------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["mkdir", "open"])
async def test_want_of_memory_that_a_session_claims_is_not_ours(box: LocalSandbox, broken: str) -> None:
    async with box.session() as session:
        await said(session, f"import os\ndef no(*_, **__): raise OSError(12, 'no')\nos.{broken} = no")
        for call in (session.fork(), session.snapshot()):
            await refused("fork_unsafe", call)
        if broken == "open":
            await refused("fork_unsafe", session.list_files())


async def test_an_error_is_text_or_nothing(box: LocalSandbox) -> None:
    """A message of nested lists could not even be written out."""
    nested = "b'{\"error\":{\"code\":\"x\",\"message\":' + b'[' * n + b']' * n + b'}}'"
    pack = (
        f"channel, n = modules['channel'], 0\nreal = channel.pack\ndef pack(kind, number, fields, data):\n"
        f"  if 'sizes' not in fields: return real(kind, number, fields, data)\n"
        f"  body = {nested}\n  return channel.FRAME.pack(kind, number, len(body), 0) + body\nchannel.pack = pack"
    )
    async with box.session() as session:
        await said(session, RUNNER + pack)
        for depth in range(900, 1000, 9):
            await said(session, f"n = {depth}")
            try:
                await refused("bad_path", session.list_files())
            except AssertionError as error:  # so deep that it is no JSON for us
                assert "session_ended" in str(error)
                break


async def test_a_member_that_is_killed_by_another_is_not_lost_by_us(box: LocalSandbox) -> None:
    """Nobody in a tree sends SIGKILL, unless its code has kept the runner from locking that up."""
    async with box.session() as session:
        await said(session, RUNNER + "runner.may_kill = False")
        (branch,) = await session.fork()
        pid = await said(branch, "import os; print(os.getpid())")
        waiting = asyncio.create_task(branch.exec("import time; time.sleep(9)"))
        await asyncio.sleep(0.2)
        await said(session, f"os.kill({pid}, 9)")
        result = await waiting
        assert (result.status, result.signal, result.attested, result.alive) == (Status.SIGNAL, 9, False, False)
        (branch,) = await session.fork()
        result = await branch.exec("import os; os.kill(os.getpid(), 9)\nimport time; time.sleep(9)")
        assert (result.status, result.signal, result.attested, result.alive) == (Status.SIGNAL, 9, False, False)


async def test_nobody_is_a_copy_of_himself(box: LocalSandbox) -> None:
    claim = "def fork(fields):\n  global kept; kept = runner._receive_descriptors()\n  os.write(kept[0], b'IR')\n"
    async with box.session() as session:
        await said(session, RUNNER + claim + "runner.fork = fork")
        await refused("fork_unsafe", session.fork())
        result = await session.exec("os._exit(3)")
        assert (result.status, result.exit_code, result.attested) == (Status.EXIT, 3, True)


@pytest.mark.parametrize("copied", [False, True])
async def test_an_end_that_nobody_saw_is_ours_only_where_there_are_no_copies(copied: bool) -> None:
    async with interpreter() as (made, _, _):
        slots = Slots(1, 1)
        session = alive(made, slots, copied)
        reply: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        session.execute(Request("1", "", Limits()), None, reply.set_result)
        made.child.end((UNKNOWN_STATUS, 0, 0))
        error = (await reply)["error"]
        assert error["code"] == ("session_ended" if copied else "lost_child") and slots.free == 1


async def test_a_copy_that_ends_as_soon_as_it_is_born_is_not_our_failure(box: LocalSandbox) -> None:
    brief = "def brief(received, *_):\n  os.setsid(); os.write(received[0], {first}); time.sleep({wait})\n"
    for first, second, wait in (
        ("b'IR'", "pass", 0),
        ("b'IR'", "pass", 0.002),
        ("b'I'", "os.write(received[0], b'R')", 0.01),
    ):
        async with box.session() as session:
            code = brief.format(first=first, wait=wait) + f"  {second}\n  os._exit(3)\nrunner._become_copy = brief"
            await said(session, RUNNER + code)
            for _ in range(10):
                try:
                    (branch,) = await session.fork()
                    assert (await branch.exec("1")).status in (Status.EXIT, Status.ERROR)  # it may not even listen
                except SessionError as error:
                    assert error.code in ("fork_unsafe", "session_ended"), error
                with contextlib.suppress(SessionError):
                    await session.snapshot()


async def test_members_over_the_memory_of_their_group_all_end_by_their_limit(box: LocalSandbox) -> None:
    if (await box.capabilities())["cgroup"] == "none":
        pytest.skip("needs control groups")
    fill = "import os\nwhile True: os.posix_fallocate(os.memfd_create('x'), 0, 8 << 20)"  # RLIMIT_AS does not count it
    for _ in range(2):
        async with box.session(limits=Limits(wall_s=30, cpu_s=30, memory_mb=32)) as session:
            branches = await session.fork(2)
            results = await asyncio.gather(*(branch.exec(fill) for branch in branches))
            assert [result.status for result in results] == [Status.MEMORY_LIMIT] * 2


async def test_who_holds_more_than_its_tree_may_is_not_copied(box: LocalSandbox) -> None:
    """It took what copies that have ended were allowed."""
    if (await box.capabilities())["cgroup"] != "v1":
        pytest.skip("where control groups of version 2 are lowered the kernel kills")
    fill = "held = [os.memfd_create('x') for _ in range(37)]\nfor fd in held: os.posix_fallocate(fd, 0, 8 << 20)"
    unchecked = "\nmodules['branch'].check = lambda ours: []"
    async with box.session(limits=Limits(wall_s=20, memory_mb=32)) as session:
        branches = await session.fork(3)
        await said(session, RUNNER + fill + unchecked)
        await asyncio.gather(*(branch.close() for branch in branches))
        assert "memory" in str(await refused("fork_unsafe", session.fork()))
        await said(session, "for fd in held: os.close(fd)")
        await session.fork()


# --- the control channel ------------------------------------------------------------------------------------------


async def test_a_number_that_no_machine_has_is_none(box: LocalSandbox) -> None:
    async with box.session() as session:
        await said(session, RUNNER + "real = runner.execute\nrunner.execute = lambda *a: ({'rss': 10**400}, b'')")
        result = await session.exec("1")
        assert (result.status, result.usage.max_rss_mb, result.alive) == (Status.OK, 0, True)


async def test_what_cannot_be_handled_is_nonsense() -> None:
    async with interpreter() as (made, _, to_report):
        ended: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        made.on_nonsense = lambda: ended.set_result(None)
        made._loop.set_exception_handler(lambda *_: None)

        def fail(*_: object) -> None:
            raise OverflowError

        made.send(EXEC, None, b"", fail)
        os.write(to_report, FRAME.pack(DONE, 1, 0, 0))
        try:
            async with asyncio.timeout(10):
                await ended
        finally:
            made._loop.set_exception_handler(None)


async def test_output_of_nobodys_execution_reaches_nobody() -> None:
    async with interpreter() as (talking, to_out, _), interpreter() as (other, _, _):
        os.write(to_out, b"secret")
        talking.listen()
        await asyncio.sleep(0.05)
        assert other.finish().stdout.text() == ""


FLOOD = "def flood():\n  time.sleep(0.2)\n  while True: os.write(runner.report, frames)\n"
START = "import threading; threading.Thread(target=flood, daemon=True).start()"
FRAMES = f"frames = {FRAME.pack(DONE, 0, 0, 0)!r} * 2520\n"


async def test_a_session_that_talks_unasked_ends(box: LocalSandbox) -> None:
    async with box.session() as session:
        await said(session, RUNNER + FRAMES.replace("2520", "1") + FLOOD.replace("while True: ", "") + START)
        with pytest.raises(SessionError, match="control channel") as caught:
            for _ in range(500):
                await session.heartbeat()
                await asyncio.sleep(0.01)
        assert caught.value.code == "session_ended"


async def test_a_snapshot_that_talks_ends(box: LocalSandbox) -> None:
    async with box.session() as session:
        await said(session, RUNNER + FRAMES + FLOOD + "def talk():\n  " + START)
        await said(session, "modules['branch'].sleep = talk")
        snapshot = await session.snapshot()
        for _ in range(500):
            if (await box.stats())["snapshots"] == 0:
                break
            await asyncio.sleep(0.01)
        await refused("no_snapshot", box.drop_snapshot(snapshot))


async def test_a_perfect_answer_after_nonsense_is_not_heard(box: LocalSandbox) -> None:
    """The process is being killed by then: its next execution would be lost by us."""
    said_both = "b'n' * 32768 + struct.pack('!cIII', b'D', 1, 0, 0)"  # in two reads
    for _ in range(5):
        async with box.session() as session:
            forge = f"import struct\nos.write(runner.report, {said_both})\ntime.sleep(9)"
            result = await session.exec(RUNNER + forge)
            assert (result.status, result.alive) == (Status.ERROR, False)
            await refused("session_ended", session.exec("1"))


async def test_a_child_of_user_code_that_comes_back_says_nothing(box: LocalSandbox) -> None:
    """It has the same channel: its word would be the answer to the execution, and it would take the next one."""
    fork = "import os\npid = os.fork()\nif not pid: {end}\nprint(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))"
    async with box.session() as session:
        own = await said(session, "import os; print(os.getpid())")
        for end, status in (("raise SystemExit(3)", 3), ("1 / 0", 1), ("exit()", 0)):
            result = await session.exec(fork.format(end=end))
            assert (result.status, result.stdout) == (Status.OK, f"{status}\n")
        await said(session, "pid = os.fork()")
        for _ in range(20):
            assert await said(session, "print(os.getpid())") == own


# --- rich results and files ---------------------------------------------------------------------------------------

REPORT = """
import os, struct
report = max(map(int, os.listdir("/proc/self/fd")))
def say(number, head, body=b""):
    data = memoryview(struct.pack("!cIII", b"D", number, len(head), len(body)) + head + body)
    while data: data = data[os.write(report, data):]
"""
"""To forge a report, in a run or a session."""
FORGED = {
    "large": "b'{\"display\":[' + b','.join([b'{\"text/plain\":\"x\"}'] * 200_000) + b']}'",
    "of old": 'b\'{"display":[{"text/plain":"x"}]}\'',
    "UTF-16": "'{\"display\":[[[\"text/plain\",1]]]}'.encode('utf-16'), b'x'",
    "endless": "b'{\"display\":[[[\"text/plain\",2]]]}', b'x'",
}


@pytest.mark.parametrize("kind", FORGED)
async def test_a_forged_rich_report_is_nothing(box: LocalSandbox, kind: str) -> None:
    once = await box.exec(REPORT + f"say(0, {FORGED[kind]})\nos._exit(0)", rich=True)
    assert (once.status, once.display) == (Status.OK, ())
    async with box.session() as session:
        result = await session.exec(REPORT + f"say(1, {FORGED[kind]})\nimport time; time.sleep(0.2)", rich=True)
        assert result.status in (Status.OK, Status.ERROR) and result.display == ()


async def test_a_forged_report_without_end_blocks_nobody(box: LocalSandbox) -> None:
    head = "b'{\"display\":[' + b','.join([b'{\"a\":\"b\"}'] * 3_000_000) + b']}'"
    started = time.monotonic()
    result = await box.exec(REPORT + f"say(0, {head})\nos._exit(0)", rich=True, limits=Limits(memory_mb=1024))
    assert result.status is Status.OUTPUT_LIMIT and result.display == () and time.monotonic() - started < 30


async def test_rich_results_are_bounded_in_bytes(box: LocalSandbox) -> None:
    code = (
        "class R:\n def __repr__(self): return 'R\\x00'\n def _repr_html_(self): return 'é' * {html}\n"
        " def _repr_latex_(self): return '\\x01' * {latex}\nR()"
    )
    async with box.session() as session:
        for html, latex, kept in ((400_000, 30_000, {"text/html", "text/latex"}), (600_000, 300_000, set())):
            for runs in (session, box):
                result = await runs.exec(code.format(html=html, latex=latex), rich=True)
                assert set(result.display[0]) == {"text/plain", *kept} and result.display[0]["text/plain"] == "R\x00"


async def test_rich_results_and_files_come_together(box: LocalSandbox) -> None:
    data = os.urandom(1 << 20) * 16
    code = "class R:\n def __repr__(self): return '\"' * 9000\n def _repr_html_(self): return '<é>'\nR()"
    result = await box.exec(code, rich=True, files={"big": data}, fetch=["none", "big"])
    assert result.display == ({"text/plain": '"' * 9000, "text/html": "<é>"},) and result.files == {"big": data}


async def test_names_of_files_may_be_long(box: LocalSandbox) -> None:
    """They are more than an answer's JSON may have."""
    names = {"/".join(["d" * 200] * 15) + f"/{number}": str(number).encode() for number in range(300)}
    assert len(json.dumps(list(names))) > 512 * 1024
    assert (await box.exec("1", files=names, fetch=list(names))).files == names
    async with box.session() as session:
        long = "folder = b'/'.join([b'\\xff' * 250] * 4)\nos.makedirs(folder)\nfor n in range(300):\n"
        await said(session, "import os\n" + long + "  open(folder + b'/%d' % n, 'w').close()")
        found = await session.list_files()
        assert len(found) == 300 and all(info.path.startswith("\udcff" * 250 + "/") for info in found)


MORE_PROCESSES = """
import os, resource, time
hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
try: resource.setrlimit(resource.RLIMIT_NPROC, (hard, hard))
except ValueError: pass  # what Python makes of EPERM
made = []
try:
    while len(made) < 40:
        made.append(os.fork())
        if not made[-1]:
            time.sleep(30)
            os._exit(0)
except BlockingIOError: pass
for child in made:
    os.kill(child, 15)
    os.waitpid(child, 0)
len(made)
"""


async def test_what_copies_may_take_is_not_for_the_code_of_a_session() -> None:
    """The kernel counts a session's copies as processes of its own; their places are nobody's else."""
    async with LocalSandbox("py-bare", Limits(wall_s=20, processes=8), workers=2) as box, box.session() as session:
        assert (await session.exec(MORE_PROCESSES)).stdout == "7\n"
        copies = await session.fork(3)
        snapshot = await session.snapshot()
        inner = (await copies[0].fork())[0]
        for member in (session, *copies, inner):
            assert (await member.exec(MORE_PROCESSES)).stdout == "7\n"
        for copy in copies:
            await copy.close()
        await session.restore(snapshot)
        assert (await session.exec(MORE_PROCESSES)).stdout == "7\n"


async def test_an_exit_code_is_a_number(box: LocalSandbox) -> None:
    forge = """
import sys
frame = sys._getframe()
while "answer" not in frame.f_locals: frame = frame.f_back
frame.f_locals["answer"]["exit_code"] = True
"""
    async with box.session() as session:
        result = await session.exec(forge)
        assert result.status is Status.OK and type(result.exit_code) is int, result
