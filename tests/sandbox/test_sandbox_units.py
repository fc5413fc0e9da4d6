"""Small parts on their own: frames, packets, kept output, judgement of endings, the idempotency store, the filter."""

from __future__ import annotations

import asyncio
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sandbox import (
    ExecResult,
    Limits,
    LocalSandbox,
    SandboxError,
    SandboxInfraError,
    SandboxOverloaded,
    SandboxUnavailable,
    SessionError,
    Status,
    paths,
    wire,
)
from sandbox.codec import dumps, result_fields
from sandbox.frames import MAX_FRAME, FrameProtocol, pack_frame
from sandbox.linux import seccomp
from sandbox.linux.numbers import ALLOWED, SPECIAL
from sandbox.remote_endpoint import Endpoint, LostRequest, Nonsense
from sandbox.supervisor import cgroups, idempotency
from sandbox.supervisor.outcome import (
    Ending,
    Kills,
    digest,
    judge,
    parse_display,
    parse_exception,
    parse_files,
    parse_frame,
)
from sandbox.supervisor.pump import Stream
from sandbox.supervisor.settings import Settings
from sandbox.worker.channel import DONE, FRAME
from sandbox.worker.display import DISPLAYS_MAX, RESULT_BYTES, describe, packed, weight
from tests.sandbox.conftest import ROOT

text = st.text(st.characters())  # lone surrogates included


def through(data: bytes, sizes: list[int]) -> tuple[list[dict[str, object]], list[str]]:
    """What a `FrameProtocol` makes of bytes that come in pieces: messages, and reasons for its end."""
    messages: list[dict[str, object]] = []
    reasons: list[str] = []

    async def feed() -> None:
        near, far = socket.socketpair()
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()

        def on_end(reason: str) -> None:
            reasons.append(reason)
            ended.set()

        protocol = FrameProtocol(messages.append, on_end)
        transport, _ = await loop.connect_accepted_socket(lambda: protocol, near)
        far.setblocking(False)
        rest = memoryview(data)
        for size in sizes:
            await loop.sock_sendall(far, rest[:size])
            rest = rest[size:]
            await asyncio.sleep(0)
        await loop.sock_sendall(far, rest)
        far.close()
        await ended.wait()
        transport.close()

    asyncio.run(feed())
    return messages, reasons


values = text | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.lists(text) | st.none()


@given(st.lists(st.dictionaries(text, values), max_size=3), st.lists(st.integers(1, 9)))
@settings(max_examples=100)
@example([{"a": "\ud800", "b": 1}, {"a": 2**64, "b": 0.1}], [1])
def test_frames_carry_any_text_in_any_pieces(messages: list[dict[str, object]], sizes: list[int]) -> None:
    assert through(b"".join(pack_frame(message) for message in messages), sizes) == (messages, [""])


@pytest.mark.parametrize("kind", [0, 0x80])  # of the JSON
@pytest.mark.parametrize("data", [b"\x7f\xff\xff\xff", b"\0\0\0\x02{]", b"\0\0\0\x021 ", b"\0\0\0\x02\xff\xff"])
def test_nonsense_frames_end_the_connection_with_a_reason(data: bytes, kind: int) -> None:
    messages, (reason,) = through(bytes([data[0] | kind]) + data[1:], [])
    assert messages == [] and reason


def test_a_cut_frame_is_the_end() -> None:
    assert through(b"\0\0\0\x10{", [])[0] == []


def test_packets_carry_descriptors() -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with near, far:
        read_end, write_end = os.pipe()
        wire.send_packet(near, wire.SPAWN, 7, (1, -2), (write_end,))
        packet = wire.receive_packet(far)
        assert packet is not None and packet[:3] == (wire.SPAWN, 7, (1, -2, 0, 0))
        os.write(packet[3][0], b"x")
        assert os.read(read_end, 9) == b"x" and not os.get_inheritable(packet[3][0])
        for fd in (read_end, write_end, *packet[3]):
            os.close(fd)
        near.close()
        assert wire.receive_packet(far) is None


@given(st.lists(st.binary(max_size=40)), st.integers(0, 50), st.integers(0, 50))
def test_stream_keeps_head_and_tail(chunks: list[bytes], head: int, tail: int) -> None:
    stream = Stream(head, tail)
    for chunk in chunks:
        stream.feed(chunk)
    everything = b"".join(chunks)
    assert stream.total == len(everything)
    shown = stream.text()
    if len(everything) <= head + tail:
        assert shown == everything.decode("utf-8", "replace") and not stream.truncated
    else:
        first, last = everything[:head], everything[len(everything) - tail :]
        assert shown.startswith(first.decode("utf-8", "ignore")) and shown.endswith(last.decode("utf-8", "ignore"))
        assert f"[{len(everything) - head - tail} bytes omitted]" in shown


def test_stream_memory_is_bounded() -> None:
    stream = Stream(1000, 1000)
    for _ in range(2000):
        stream.feed(b"x" * 65536)
        assert len(stream.head) + len(stream.tail) < 300_000
    assert stream.total == 2000 * 65536


REPORT = json.dumps({"type": "KeyError", "message": "m", "traceback": "t"}).encode()
OUT_OF_MEMORY = json.dumps({"type": "MemoryError", "message": "", "traceback": "t"}).encode()
EXITED = {code: code << 8 for code in (0, 1, 3)}


@pytest.mark.parametrize(
    ("status", "cpu_us", "killed_for", "report", "expected"),
    [
        (EXITED[0], 0, None, b"", Status.OK),
        (EXITED[0], 0, None, REPORT, Status.OK),
        (EXITED[1], 0, None, REPORT, Status.ERROR),
        (EXITED[1], 0, None, OUT_OF_MEMORY, Status.MEMORY_LIMIT),
        (EXITED[1], 0, None, b"", Status.EXIT),
        (EXITED[1], 0, None, b'{"status": "ok"}', Status.EXIT),
        (EXITED[1], 0, None, b"[" * 100_000, Status.EXIT),
        (EXITED[3], 0, None, REPORT, Status.EXIT),
        (signal.SIGSEGV, 0, None, REPORT, Status.SIGNAL),
        (signal.SIGXCPU, 0, None, b"", Status.CPU_LIMIT),
        (signal.SIGKILL, 5_900_000, None, b"", Status.CPU_LIMIT),
        (signal.SIGKILL, 0, Status.TIMEOUT, b"", Status.TIMEOUT),
        (signal.SIGKILL, 0, Status.OUTPUT_LIMIT, b"", Status.OUTPUT_LIMIT),
        (EXITED[0], 0, Status.CANCELLED, b"", Status.CANCELLED),
    ],
)
def test_judgement(status: int, cpu_us: int, killed_for: Status | None, report: bytes, expected: Status) -> None:
    said, _ = parse_frame(FRAME.pack(DONE, 0, len(report), 0) + report)
    assert judge(Ending(status, cpu_us, killed_for, said, 0), Limits()).status is expected


@pytest.mark.parametrize(("oom", "code"), [(0, "lost_child"), (2, "oom_host")])
def test_an_unexplained_kill_is_ours(oom: int, code: str) -> None:
    with pytest.raises(SandboxInfraError) as caught:
        judge(Ending(signal.SIGKILL, 10_000, None, REPORT, oom), Limits())
    assert caught.value.code == code and caught.value.retryable


def test_a_kill_by_relatives_is_neither_ours_nor_attested() -> None:
    outcome = judge(Ending(signal.SIGKILL, 10_000, None, REPORT, related=True), Limits())
    assert (outcome.status, outcome.signal, outcome.attested) == (Status.SIGNAL, 9, False)
    with pytest.raises(SandboxInfraError):
        judge(Ending(signal.SIGKILL, 10_000, None, REPORT, oom=1, related=True), Limits())


def test_kills_in_our_groups_are_not_the_machines(tmp_path: Path) -> None:
    class Driver:
        events = "events"

    groups = []
    for number, count in enumerate((0, 3, 0)):
        group = object.__new__(cgroups.Group)
        group.folder, group._driver, group.lent_at = tmp_path / str(number), Driver(), 0  # type: ignore[assignment]
        group.folder.mkdir()
        (group.folder / "events").write_text(f"low 0\noom 9\noom_kill {count}\n")
        groups.append(group)
    first, second, third = groups

    def now(machine: int) -> Kills:
        return Kills(machine, {group: group.kills() for group in groups})

    before = now(10)
    (first.folder / "events").write_text("oom_kill 2\n")
    (third.folder / "events").write_text("oom_kill 1\n")
    for _ in range(2):  # whoever asks uses nothing up
        assert now(13).since(before, first) == (0, 2) and now(15).since(before, second) == (2, 0)
    second.lent_at, first.lent_at = 3, 2  # given back and lent again since `before`
    assert now(13).since(before, first) == (0, 0)
    for group in groups:
        del cgroups._KILLS[group]


@given(st.binary())
def test_any_report_is_parsed_or_nothing(data: bytes) -> None:
    for frame in (data, FRAME.pack(DONE, 0, len(data), 0) + data):
        fields, body = parse_frame(frame)
        assert body == b"" and (fields == {} or fields == json.loads(data))


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | text,
    lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["type", "message", "traceback", "files"]), inner),
)


@given(json_values, st.binary())
def test_any_fields_are_an_exception_or_nothing(fields: object, body: bytes) -> None:
    found = parse_exception(fields)
    assert found is None or all(isinstance(value, str) for value in found.__dict__.values())
    for table in (fields, [fields], [[1, fields]]):
        for name, data in parse_files({"files": table}, body, ["a", "b"]).items():
            assert name in ("a", "b") and data in body
    assert parse_files({"files": [[1, len(body)], [0, 0]]}, body, ["a", "b"]) == {"a": b"", "b": body}


table_values = st.recursive(
    st.sampled_from(["text/plain", "x" * 65, -1, 0, 1, 2, 1 << 70]), lambda inner: st.lists(inner, max_size=10)
)


@given(table_values, st.binary())
@example([[["a", 2]], [["b", 1], ["c", 1]]], b"\xc3\xa9bc!")
@example([[["a", 1]]] * 9, b"0123456789")
@example([[["a", 1]] * 9], b"0123456789")
def test_any_table_is_rich_results_or_nothing(table: object, body: bytes) -> None:
    results, used = parse_display({"display": table}, body)
    texts = [text for result in results for text in result.values()]
    assert len(results) <= 8 and all(0 < len(result) <= 8 for result in results)
    assert sum(len(text.encode()) for text in texts) <= used <= len(body)
    if table == [[["a", 2]], [["b", 1], ["c", 1]]]:
        assert (results, used) == ([{"a": "é"}, {"b": "b", "c": "c"}], 4)


@pytest.mark.parametrize("letter", ["x", '"', "\\", "\n", "\x01", "\x7f", "é", "€", "😀"])
def test_the_largest_rich_results_fit_beside_the_largest_file(letter: str) -> None:
    """In a frame as well as in an answer of the service, where all is ASCII."""
    full = letter.encode() * (RESULT_BYTES // weight(letter.encode()))
    table, body = packed([{"text/plain": full}] * DISPLAYS_MAX)
    results, used = parse_display(json.loads(json.dumps({"display": table})), body)
    assert results == [{"text/plain": full.decode()}] * DISPLAYS_MAX and used == len(body)
    fields = result_fields(ExecResult(Status.OK, stdout="\x01" * 90_000, display=tuple(results)))
    spare = MAX_FRAME - 4 * paths.MAX_BYTES // 3 - 1024 * 1024
    assert max(len(dumps(fields)), len(pack_frame(fields))) < spare
    more, used = parse_display({"display": [[["a", len(full) + 8], ["b", 1]]]}, full + letter.encode() * 8 + b"b")
    assert more == []


@given(st.lists(text, min_size=1), st.lists(text, min_size=1))
def test_digest_separates_its_parts(first: list[str], second: list[str]) -> None:
    assert (digest(*first) == digest(*second)) == (first == second)


def _raise(error: SandboxError) -> None:
    raise error


def test_errors_reach_other_processes_as_they_are() -> None:
    server = Endpoint("http://127.0.0.1:1", None, 1)
    errors = [
        SandboxError("a"),
        SandboxUnavailable("a"),
        SandboxOverloaded("a", 2.5),
        SandboxInfraError("a", "lost_child", retryable=False),
        SessionError("a", "busy"),
        LostRequest("a", sent=True, late=True, server=server),
        Nonsense("a", server),
    ]
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        raised = [pool.submit(_raise, error).exception() for error in errors]
    for error, found in zip(errors, raised, strict=True):
        assert type(found) is type(error) and str(found) == "a"
        expected = {**vars(error), **({"server": None} if "server" in vars(error) else {})}
        assert {name: value for name, value in vars(found).items() if name in expected} == expected


async def test_idempotency_store_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(idempotency, "KEEP_BYTES", 1000)
    store = idempotency.IdempotencyStore()
    running = store.begin("running", 1)
    for index in range(100):
        store.begin(f"k{index}", 1)
        store.finish(f"k{index}", {"n": index}, 100, keep=True)
    assert store.find("running", 1) is running and store.find("k0", 1) is None
    kept = store.find("k99", 1)
    assert kept is not None and kept.result() == {"n": 99}
    assert sum(store.find(f"k{index}", 1) is not None for index in range(100)) <= 10
    store.begin("failed", 1)
    store.finish("failed", {"error": {}}, 0, keep=False)
    assert store.find("failed", 1) is None


def test_settings_survive_the_command_line() -> None:
    settings = Settings(profile="py-bare", limits=Limits(wall_s=1.5), module_paths=("/a b", "/c"), client_fd=7)
    assert Settings.from_json(settings.to_json()) == settings


def test_describe_survives_anything() -> None:
    class Hostile(Exception):
        def __str__(self) -> str:
            raise KeyboardInterrupt

    assert describe(Hostile())["type"] == "Hostile"
    loop = ValueError("a")
    loop.__context__ = KeyError("b")
    loop.__context__.__context__ = loop
    assert describe(loop)["traceback"].endswith("ValueError: a\n")
    assert len(describe(ValueError("x" * 10**6))["traceback"]) < 20_000


def test_call_tables_name_the_same_calls() -> None:
    assert set(ALLOWED["aarch64"]) <= set(ALLOWED["x86_64"])
    assert set(SPECIAL["aarch64"]) == set(SPECIAL["x86_64"])
    for machine in ALLOWED:
        numbers = [*ALLOWED[machine].values(), *SPECIAL[machine].values()]
        assert len(set(numbers)) == len(numbers)
    dangerous = {
        "ptrace",
        "mount",
        "unshare",
        "setns",
        "bpf",
        "socket",
        "connect",
        "bind",
        "splice",
        "keyctl",
        "chroot",
    }
    assert not dangerous & set(ALLOWED["x86_64"])


@pytest.mark.parametrize("deny_fork", [False, True])
@pytest.mark.parametrize("pid", [1, 2, 0x10001, 4_194_303])
def test_an_aimed_filter_is_the_one_compiled_for_that_process(pid: int, deny_fork: bool) -> None:
    prepared = seccomp.Filter(deny_fork, not deny_fork, 5)
    prepared.aim(pid)
    program = bytes(prepared._program._buffer)
    assert program == seccomp._compile(pid, deny_fork, not deny_fork) and len(program) // 8 < 4096


def test_the_package_needs_nothing_of_ours_and_no_torch() -> None:
    code = "import sandbox.local, sandbox.tools, sys; print([m for m in sys.modules if m.split('.')[0] in ('retool', 'data_gen', 'torch', 'numpy')])"  # noqa: E501
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("limit", [{"wall_s": math.nan}, {"wall_s": math.inf}, {"cpu_s": -1.0}, {"memory_mb": -1}])
def test_limits_are_finite_numbers(limit: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(limit))):
        Limits(**limit)


@pytest.mark.parametrize("deadline", [math.nan, math.inf])
async def test_a_deadline_is_a_finite_number(deadline: float) -> None:
    async with LocalSandbox("py-bare") as box:
        with pytest.raises(ValueError, match="deadline_s"):
            await box.exec("1", deadline_s=deadline)
