"""What a run gives back: typed status, output, exceptions, usage, determinism."""

# ruff: noqa: E501 (programs on one line; tests may block)
from __future__ import annotations

import asyncio
import random

import pytest

from sandbox import Limits, LocalSandbox, SandboxInfraError, SandboxUnavailable, Status

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest.mark.parametrize(
    ("code", "status", "exit_code", "signal"),
    [
        ("x = 1", Status.OK, 0, None),
        ("1/0", Status.ERROR, 1, None),
        ("def f(:", Status.ERROR, 1, None),
        ("import os; os._exit(7)", Status.EXIT, 7, None),
        ("import os; os._exit(0)", Status.OK, 0, None),
        ("raise SystemExit", Status.OK, 0, None),
        ("import sys; sys.exit('x')", Status.EXIT, 1, None),
        ("raise SystemExit(2**40)", Status.EXIT, 255, None),
        ("raise KeyboardInterrupt", Status.ERROR, 1, None),
        ("import os; os.abort()", Status.SIGNAL, None, 6),
        ("import ctypes; ctypes.string_at(0)", Status.SIGNAL, None, 11),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", Status.SIGNAL, None, 15),
        ("x = bytearray(10**9)", Status.MEMORY_LIMIT, 1, None),
        ("x = [bytearray(50 << 20) for _ in range(100)]", Status.MEMORY_LIMIT, 1, None),
        ("\0", Status.ERROR, 1, None),
        ("(" * 5000 + ")" * 5000, Status.ERROR, 1, None),
        ("str(10**100000)", Status.ERROR, 1, None),
    ],
)
async def test_status(box: LocalSandbox, code: str, status: Status, exit_code: int | None, signal: int | None) -> None:
    result = await box.exec(code)
    assert (result.status, result.exit_code, result.signal) == (status, exit_code, signal), result
    assert result.isolation == box.tier != "none"


async def test_deep_recursion_is_typed(box: LocalSandbox) -> None:
    result = await box.exec(
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)", limits=Limits(wall_s=60, cpu_s=2)
    )
    assert result.status in (Status.ERROR, Status.SIGNAL, Status.MEMORY_LIMIT, Status.CPU_LIMIT)


async def test_a_memory_error_names_its_line(box: LocalSandbox) -> None:
    result = await box.exec("keep = []\nwhile True:\n    keep.append(bytearray(10 << 20))")
    assert result.status is Status.MEMORY_LIMIT and not result.attested
    assert result.exception is not None and "line 3" in result.exception.traceback


async def test_tracebacks_show_user_frames_only(box: LocalSandbox) -> None:
    code = "import json\ndef load():\n    return json.loads('{')\ntry:\n    load()\nexcept ValueError as e:\n    raise KeyError('k') from e"
    result = await box.exec(code)
    assert result.exception is not None
    trace = result.exception.traceback
    assert 'File "main.py", line 3, in load' in trace and "return json.loads('{')" in trace
    assert trace.endswith("KeyError: 'k'\n") and "direct cause" in trace
    assert "json/" not in trace and "display.py" not in trace and "site-packages" not in trace
    assert (result.exception.type, result.exception.message) == ("KeyError", "'k'")


async def test_an_exception_that_lies_costs_nothing(box: LocalSandbox) -> None:
    result = await box.exec("class E(Exception):\n    def __str__(self): raise SystemExit(0)\nraise E()")
    assert result.status is Status.ERROR and result.exception is not None and result.exception.type == "E"


@pytest.mark.parametrize(
    ("code", "stdout"),
    [
        ("1 + 1", "2\n"),
        ("x = 3\nx * 2", "6\n"),
        ("print('a')\n5", "a\n"),
        ("None", ""),
        ("def f(): return 4\nf()", "4\n"),
        ("'text'", "'text'\n"),
        ("import sympy\nx = sympy.Symbol('x')\nsympy.integrate(2*x, x)", "x**2\n"),
        ("import numpy as np\nnp.arange(3)", "array([0, 1, 2])\n"),
        ("x = 1;", ""),
        ("import sys; sys.stdout.write('no newline')", "no newline"),
        ("", ""),
        ("if True:\n    7", ""),
    ],
)
async def test_last_expression_is_displayed_when_nothing_was_printed(box: LocalSandbox, code: str, stdout: str) -> None:
    result = await box.exec(code)
    assert (result.status, result.stdout) == (Status.OK, stdout), result


async def test_main_behaves_like_a_script(box: LocalSandbox) -> None:
    code = """
import atexit, pickle, sys, threading
from dataclasses import dataclass
@dataclass
class P:
    x: int
assert pickle.loads(pickle.dumps(P(3))) == P(3)
assert __name__ == "__main__" and sys.argv == ["main.py"]
atexit.register(print, "last")
threading.Timer(0.05, print, ["thread"]).start()
print("first")
"""
    result = await box.exec(code)
    assert result.stdout == "first\nthread\nlast\n", result


async def test_stdin(box: LocalSandbox) -> None:
    assert (await box.exec("print(input(), input())", stdin="a\nb\n")).stdout == "a b\n"
    nothing = await box.exec("input()")
    assert nothing.status is Status.ERROR and nothing.exception is not None and nothing.exception.type == "EOFError"


async def test_stdin_larger_than_a_pipe_that_nobody_reads(box: LocalSandbox) -> None:
    assert (await box.exec("print('done')", stdin="x" * 3_000_000)).stdout == "done\n"
    assert (await box.exec("import sys; print(len(sys.stdin.read()))", stdin="x" * 3_000_000)).stdout == "3000000\n"


async def test_300_kb_of_output_arrive_complete(box: LocalSandbox) -> None:
    limits = Limits(output_head_bytes=400_000)
    result = await box.exec("import sys\nprint('y' * 300_000)\nprint('e' * 300_000, file=sys.stderr)", limits=limits)
    assert result.status is Status.OK and not result.truncated
    assert result.stdout == "y" * 300_000 + "\n" and result.stderr == "e" * 300_000 + "\n"


async def test_100_mb_of_output_are_cut_and_killed(box: LocalSandbox) -> None:
    result = await box.exec("print('start')\nfor _ in range(100): print('z' * 1_000_000)\nprint('end')")
    assert result.status is Status.OUTPUT_LIMIT and result.truncated
    assert result.stdout.startswith("start\nzzz") and len(result.stdout) < 100_000


async def test_truncation_keeps_head_tail_and_the_error(box: LocalSandbox) -> None:
    limits = Limits(output_head_bytes=100, output_tail_bytes=50)
    result = await box.exec("print('é' * 5000)\nprint('tail')\n1/0", limits=limits)
    assert result.status is Status.ERROR and result.truncated
    assert result.stdout.startswith("ééé") and result.stdout.endswith("é\ntail\n") and "bytes omitted" in result.stdout
    assert result.exception is not None and result.exception.type == "ZeroDivisionError"


async def test_output_exactly_over_the_cap_is_always_output_limit(box: LocalSandbox) -> None:
    limits = Limits(output_kill_bytes=10_000)
    assert (await box.exec("print('x' * 9_999)", limits=limits)).status is Status.OK
    assert (await box.exec("print('x' * 10_000)", limits=limits)).status is Status.OUTPUT_LIMIT


async def test_a_timeout_returns_what_was_printed(box: LocalSandbox) -> None:
    result = await box.exec("import time\nprint('before', flush=True)\ntime.sleep(1e6)", limits=Limits(wall_s=1))
    assert (result.status, result.stdout) == (Status.TIMEOUT, "before\n")
    assert result.attested


async def test_timeout_ignores_what_the_code_ignores(box: LocalSandbox) -> None:
    code = "import signal\nfor s in (2, 15, signal.SIGXCPU): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"
    result = await box.exec(code, limits=Limits(wall_s=30, cpu_s=1))
    assert result.status is Status.CPU_LIMIT and result.signal == 9


@pytest.mark.parametrize("code", ["while True: pass", "9**9**9", "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')"])
async def test_cpu_limit(box: LocalSandbox, code: str) -> None:
    result = await box.exec(code, limits=Limits(wall_s=60, cpu_s=1))
    assert result.status is Status.CPU_LIMIT and result.usage.cpu_ms >= 500


async def test_rejected_without_running(box: LocalSandbox) -> None:
    large = await box.exec("x" * 2_000, limits=Limits(code_bytes=1_000))
    assert large.status is Status.REJECTED and "1000" in large.stderr
    surrogate = await box.exec("print('\ud800')")
    assert surrogate.status is Status.REJECTED and "not text" in surrogate.stderr


async def test_bytes_that_are_no_text(box: LocalSandbox) -> None:
    result = await box.exec(r"import os; os.write(1, b'a\xff\xfeb'); print(chr(0xd800))")
    assert result.status is Status.OK and result.stdout == "a\ufffd\ufffdb?\n"


async def test_seed_decides_random_numbers_and_digest(box: LocalSandbox) -> None:
    code = "import random, numpy\nprint(random.random(), numpy.random.rand(), hash('a'))"
    first, again, other = [await box.exec(code, seed=seed) for seed in (1, 1, 2)]
    assert first.stdout == again.stdout and first.digest == again.digest
    assert first.stdout.split()[:2] != other.stdout.split()[:2] and first.digest != other.digest
    assert first.stdout.split()[2] == other.stdout.split()[2]


async def test_runs_share_no_state(box: LocalSandbox) -> None:
    await box.exec(
        "import builtins, math, os; builtins.x = 1; math.pi = 3; open('left', 'w').write('x'); os.environ['A'] = '1'"
    )
    result = await box.exec(
        "import builtins, math, os; print(hasattr(builtins, 'x'), math.pi > 3.1, os.listdir('.'), 'A' in os.environ)"
    )
    assert result.stdout == "False True [] False\n"


async def test_forged_report_changes_no_status(box: LocalSandbox) -> None:
    """Whatever is written to whichever descriptor, success and failure follow from the wait status."""
    flood = """
import json, os, struct
said = {"type": "Forged", "message": "m", "traceback": "t"}
fake = json.dumps({"status": "ok", "reward": 1, "exit_code": 0, "exception": said}).encode()
fake = struct.pack("!cIII", b"D", 0, len(fake), 0) + fake
for fd in range(3, 1024):
    try: os.write(fd, fake)
    except OSError: pass
"""
    failed = await box.exec(flood + "os._exit(3)")
    assert (failed.status, failed.exit_code, failed.exception) == (Status.EXIT, 3, None)
    passed = await box.exec(flood + "os._exit(0)")
    assert passed.status is Status.OK and passed.exception is None
    words = await box.exec(flood + "os._exit(1)")  # all that can be forged: the words of one's own failure
    assert words.status is Status.ERROR and not words.attested


async def test_usage_and_queue_time(box: LocalSandbox) -> None:
    limits = Limits(wall_s=30)
    results = await asyncio.gather(*(box.exec("import time; time.sleep(0.2)", limits=limits) for _ in range(7)))
    assert all(r.ok and r.usage.wall_ms >= 200 and r.usage.max_rss_mb > 5 for r in results)
    assert max(r.usage.queue_ms for r in results) >= 200  # 3 at once: the seventh waits for two rounds


async def test_queue_is_in_order(box: LocalSandbox) -> None:
    finished: list[int] = []

    async def one(index: int) -> None:
        await box.exec("import time; time.sleep(0.3)")
        finished.append(index)

    await asyncio.gather(*(one(index) for index in range(9)))
    assert {*finished[:3]} == {0, 1, 2} and {*finished[6:]} == {6, 7, 8}


async def test_idempotency_key_runs_once(box: LocalSandbox) -> None:
    before = (await box.stats())["executions"]
    key = f"key-{random.random()}"
    code = "import time, os; time.sleep(0.2); print(os.urandom(8).hex())"
    results = await asyncio.gather(*(box.exec(code, idempotency_key=key) for _ in range(3)))
    later = await box.exec(code, idempotency_key=key)
    assert len({r.stdout for r in [*results, later]}) == 1
    assert (await box.stats())["executions"] == before + 1


async def test_a_key_stands_for_one_program(box: LocalSandbox) -> None:
    first = await box.exec("print(1)", idempotency_key="one")
    assert (await box.exec("print(1)", idempotency_key="one", deadline_s=5)).stdout == first.stdout == "1\n"
    for other in (
        {"code": "print(2)"},
        {"code": "print(1)", "seed": 2},
        {"code": "print(1)", "limits": Limits(wall_s=2)},
    ):
        with pytest.raises(SandboxInfraError, match="'one' was used for a different") as conflict:
            await box.exec(**other, idempotency_key="one")
        assert (conflict.value.code, conflict.value.retryable) == ("idempotency_conflict", False)
    session = await box.session(seed=1, idempotency_key="one")
    with pytest.raises(SandboxInfraError):
        await box.session(seed=2, idempotency_key="one")
    await session.close()


async def test_cancelled_call_frees_its_worker(box: LocalSandbox) -> None:
    calls = [asyncio.create_task(box.exec("import time; time.sleep(1e6)", limits=Limits(wall_s=300))) for _ in range(5)]
    await asyncio.sleep(0.3)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    assert (await box.exec("print(1)")).ok
    for _ in range(500):  # the kill takes a moment; the calls would take 300 s
        stats = await box.stats()
        if not stats["running"] and not stats["waiting"]:
            break
        await asyncio.sleep(0.02)
    assert (stats["running"], stats["waiting"], stats["leaked"]) == (0, 0, 0)


async def test_not_opened_and_closed_twice() -> None:
    box = LocalSandbox("py-bare")
    with pytest.raises(SandboxUnavailable, match="not open"):
        await box.exec("1")
    await box.close()
    await box.close()


async def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="py-math"):
        LocalSandbox("py-maths")
    with pytest.raises(ValueError, match="choose from"):
        LocalSandbox(tier="vm")


async def test_a_pool_is_waited_for_at_the_end(box: LocalSandbox) -> None:
    """Its threads are ended by a hook of `threading`, not by being joined."""
    late = "from concurrent.futures import ThreadPoolExecutor\nimport time\nThreadPoolExecutor().submit(lambda: (time.sleep(0.2), print('late')))"
    assert (await box.exec(late)).stdout.endswith("late\n")
