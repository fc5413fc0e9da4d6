"""Sessions: state, limits that keep it or end it, numbered executions, interrupts, blame."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from sandbox import Limits, LocalSandbox, SandboxInfraError, Session, SessionError, Status

pytestmark = pytest.mark.asyncio(loop_scope="module")
LONG = Limits(wall_s=60, cpu_s=60)
IMPATIENT = Limits(wall_s=0.3)


async def refused(code: str, call: object) -> SessionError:
    """The error of a call that must fail with `code`."""
    with pytest.raises(SessionError) as caught:
        await call  # type: ignore[misc]
    assert caught.value.code == code, caught.value
    return caught.value


async def test_state_is_kept_and_sessions_share_none(box: LocalSandbox) -> None:
    async with box.session() as session, box.session() as other:
        first = await session.exec("import numpy\nx = numpy.arange(3)\ndef double(): return 2 * x")
        assert (first.status, first.stdout, first.step, first.alive, first.attested) == (Status.OK, "", 1, True, False)
        second = await session.exec("print('sum', double().sum())")
        assert (second.stdout, second.step, second.isolation, second.profile) == ("sum 6\n", 2, box.tier, "py-math")
        assert second.usage.wall_ms > 0 and second.usage.max_rss_mb > 1 and len(second.digest) == 64
        assert (await other.exec("x")).exception.type == "NameError"  # type: ignore[union-attr]
        assert session.id != other.id


async def test_the_last_expression_is_shown_cell_by_cell(box: LocalSandbox) -> None:
    async with box.session() as session:
        assert (await session.exec("print('a')\n1")).stdout == "a\n"
        assert (await session.exec("2")).stdout == "2\n"
        assert (await session.exec("None")).stdout == ""
        assert (await session.exec("_ = 3;")).stdout == ""


async def test_tracebacks_show_the_cell_that_defined_the_function(box: LocalSandbox) -> None:
    async with box.session() as session:
        await session.exec("def broken(x):\n    return 1 / x")
        failed = await session.exec("broken(0)")
        assert failed.status is Status.ERROR and failed.exception is not None and not failed.attested
        assert 'File "cell 1", line 2, in broken\n    return 1 / x' in failed.exception.traceback
        assert "sandbox" not in failed.exception.traceback
        syntax = await session.exec("def")
        assert syntax.exception is not None and syntax.exception.type == "SyntaxError"
        assert (await session.exec("print(broken(2))")).stdout == "0.5\n"


async def test_stdin_belongs_to_one_execution(box: LocalSandbox) -> None:
    async with box.session() as session:
        assert (await session.exec("print(input(), input())", stdin="a\nb\nc")).stdout == "a b\n"
        assert (await session.exec("input()")).exception.type == "EOFError"  # type: ignore[union-attr]
        assert (
            await session.exec("import sys; print(repr(sys.stdin.read()))", stdin="\udcff\n")
        ).stdout == "'\ufffd\\n'\n"


async def test_seeds_decide_random_numbers(box: LocalSandbox) -> None:
    draw = "import random, numpy\nprint(random.random(), numpy.random.rand())"
    outputs = []
    for seed in (1, 1, 2):
        async with box.session(seed=seed) as session:
            outputs.append((await session.exec(draw)).stdout)
    assert outputs[0] == outputs[1] != outputs[2]


# --- limits -------------------------------------------------------------------------------------------------------

ENDINGS = {
    Status.TIMEOUT: ("print('partial', flush=True)\nimport time; time.sleep(99)", Limits(wall_s=0.3)),
    Status.CPU_LIMIT: ("print('partial', flush=True)\nwhile True: pass", Limits(wall_s=60, cpu_s=0.3)),
    Status.OUTPUT_LIMIT: (
        "print('partial')\nwhile True: print('x' * 1000)",
        Limits(wall_s=60, output_kill_bytes=300_000),
    ),
}


@pytest.mark.parametrize("status", ENDINGS)
async def test_a_limit_interrupts_and_keeps_the_state(box: LocalSandbox, status: Status) -> None:
    code, limits = ENDINGS[status]
    async with box.session() as session:
        await session.exec("kept = 7")
        result = await session.exec(code, limits=limits)
        assert (result.status, result.alive, result.attested) == (status, True, True)
        assert result.stdout.startswith("partial\n")
        assert result.exception is not None and result.exception.type == "KeyboardInterrupt"
        assert result.truncated == (status is Status.OUTPUT_LIMIT)
        assert (await session.exec("print(kept)")).stdout == "7\n"


STUBBORN = "import signal; signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])\n"


@pytest.mark.parametrize("status", ENDINGS)
async def test_who_ignores_the_interrupt_is_killed(box: LocalSandbox, status: Status) -> None:
    code, limits = ENDINGS[status]
    async with box.session() as session:
        result = await session.exec(STUBBORN + code, limits=limits)
        assert (result.status, result.alive, result.attested) == (status, False, True)
        assert result.stdout.startswith("partial\n")
        assert "its process has ended" in str(await refused("session_ended", session.exec("1")))


async def test_catching_the_interrupt_does_not_help(box: LocalSandbox) -> None:
    stubborn = (
        "import time\nwhile True:\n  try:\n    while True: time.sleep(1)\n"
        "  except BaseException: print('no', flush=True)"
    )
    async with box.session() as session:
        result = await session.exec(stubborn, limits=IMPATIENT)
        assert (result.status, result.alive, result.stdout) == (Status.TIMEOUT, False, "no\n")


async def test_memory_and_processes_hold_for_the_whole_session(box: LocalSandbox) -> None:
    async with box.session(limits=Limits(wall_s=20, memory_mb=100, processes=4)) as session:
        result = await session.exec("held = bytearray(1 << 30)", limits=Limits(memory_mb=4000))
        assert (result.status, result.attested, result.alive) == (Status.MEMORY_LIMIT, False, True)
        for _ in range(2):  # and again, after the reserve was used for describing the first
            assert (await session.exec("[0] * 10**9")).status is Status.MEMORY_LIMIT
        forks = "import os, time\nn = 0\ntry:\n  while True:\n    if not os.fork(): time.sleep(9)\n    n += 1\n"
        counted = await session.exec(forks + "except OSError as error: print(n, error.errno)")
        assert counted.stdout == "3 11\n"


async def test_cpu_is_counted_for_each_execution(box: LocalSandbox) -> None:
    burn = "import time\nt = time.process_time()\nwhile time.process_time() - t < 0.25: pass"
    async with box.session(limits=Limits(wall_s=60, cpu_s=0.6)) as session:
        for _ in range(4):
            result = await session.exec(burn)
            assert result.status is Status.OK and 240 <= result.usage.cpu_ms < 600


async def test_big_output_arrives_whole(box: LocalSandbox) -> None:
    limits = Limits(wall_s=20, output_head_bytes=400_000)
    async with box.session(limits=limits) as session:
        for size in (10, 70_000, 300_000):
            result = await session.exec(f"import sys\nsys.stdout.write('x' * {size})\nsys.stderr.write('y' * 9)")
            assert (result.status, len(result.stdout), result.stderr) == (Status.OK, size, "y" * 9)


async def test_a_thread_prints_between_executions(box: LocalSandbox) -> None:
    """It goes to the next one, and a flood waits in the pipe instead of in the supervisor."""
    flood = (
        "import threading, time, os\ndef talk():\n  time.sleep(0.2)\n  for _ in range(1000): os.write(1, b'z' * 1000)\n"
        "threading.Thread(target=talk, daemon=True).start()"
    )
    async with box.session() as session:
        assert (await session.exec(flood)).status is Status.OK
        await asyncio.sleep(0.5)
        result = await session.exec("import time; time.sleep(0.5)", limits=Limits(wall_s=9, output_kill_bytes=10**7))
        assert result.status is Status.OK and result.stdout.startswith("zzz") and result.truncated


# --- the end of the process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "status", "field", "value"),
    [
        ("import os; os._exit(0)", Status.OK, "exit_code", 0),
        ("import os; os._exit(3)", Status.EXIT, "exit_code", 3),
        ("import os; os.abort()", Status.SIGNAL, "signal", 6),
        ("import ctypes; ctypes.string_at(0)", Status.SIGNAL, "signal", 11),
    ],
)
async def test_a_process_that_dies_is_judged_by_its_wait_status(
    box: LocalSandbox, code: str, status: Status, field: str, value: int
) -> None:
    async with box.session() as session:
        result = await session.exec("print('said', flush=True)\n" + code)
        assert (result.status, getattr(result, field)) == (status, value)
        assert (result.alive, result.attested, result.stdout) == (False, True, "said\n")
        await refused("session_ended", session.exec("1"))
        await refused("session_ended", session.heartbeat())
        again = await session.exec("print('said', flush=True)\n" + code, expect_step=1)
        assert again == result  # a retry still gets what was done


async def test_exit_ends_the_execution_and_not_the_session(box: LocalSandbox) -> None:
    async with box.session() as session:
        for code, status, number in (
            ("exit()", "ok", 0),
            ("raise SystemExit(4)", "exit", 4),
            ("exit('no')", "exit", 1),
        ):
            result = await session.exec("x = 1\n" + code)
            assert (result.status.value, result.exit_code, result.alive) == (status, number, True)
        assert (await session.exec("print(x)")).stdout == "1\n"


async def test_a_session_cannot_blame_the_machine(box: LocalSandbox) -> None:
    async with box.session() as session:
        tries = "import os, resource\n"
        for call in ("os.kill(os.getpid(), 9)", "os.kill(0, 9)", "resource.setrlimit(resource.RLIMIT_CPU, (1, 1))"):
            tries += f"try:\n  {call}; print('possible')\nexcept (PermissionError, ValueError): print('refused')\n"
        assert (await session.exec(tries)).stdout == "refused\n" * 3


def named(name: str) -> int:
    """The process that calls itself `name`; 0 when there is none."""
    for path in Path("/proc").glob("[0-9]*/comm"):
        try:
            if path.read_text() == f"{name}\n":
                return int(path.parent.name)
        except OSError:
            continue
    return 0


async def test_a_kill_from_outside_is_ours(box: LocalSandbox) -> None:
    code = "import ctypes; ctypes.CDLL(None).prctl(15, b'a-victim')\nwhile True: pass"
    async with box.session() as session:
        task = asyncio.create_task(session.exec(code, limits=LONG))
        while not (pid := named("a-victim")):  # noqa: ASYNC110 (nobody tells us)
            await asyncio.sleep(0.02)
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(SandboxInfraError) as caught:
            await task
        assert caught.value.code == "lost_child" and caught.value.retryable
        await refused("session_ended", session.exec("1"))


async def test_forged_answers_change_only_the_forger(box: LocalSandbox) -> None:
    """Whatever is written to the control channel, limits hold and neighbours see nothing of it."""
    forge = "import os\nfor fd in range(3, 1024):\n  try: os.write(fd, {data})\n  except OSError: pass\n"
    async with box.session() as session, box.session() as other:
        result = await session.exec(forge.format(data="b'nonsense' * 9") + "import time; time.sleep(9)")
        assert (result.status, result.alive, result.attested) == (Status.ERROR, False, True)
        assert result.exception is not None and result.exception.type == "ControlChannelError"
        assert (await other.exec("print(1)")).stdout == "1\n"
    frame = "import struct\nfake = struct.pack('!cIII', b'D', {number}, 2, 0) + b'{{}}'\n"
    slowly = forge.format(data="fake") + "import time; time.sleep(0.3); print('late')"
    async with box.session() as session:
        early = await session.exec(frame.format(number=1) + slowly)
        assert early.status is Status.OK and not early.attested  # it lied about its own end, and that is all
        again = await session.exec("print(1)")  # as which the true answer comes
        assert (again.status, again.alive, again.exception and again.exception.type) == (
            *(Status.ERROR, False),
            "ControlChannelError",
        )
    async with box.session() as session:
        early = await session.exec(frame.format(number=2) + slowly)
        assert (early.status, early.alive) == (Status.ERROR, False)


async def test_a_forger_is_never_our_failure(box: LocalSandbox) -> None:
    """It writes when nothing is running, or just when the next execution begins: that is its end, not ours."""
    later = (
        "import os, threading, time\ndef forge():\n  time.sleep({wait})\n  for fd in range(3, 1024):\n"
        "    try: os.write(fd, b'nonsense' * 9)\n    except OSError: pass\nthreading.Thread(target=forge).start()"
    )
    before, forged = (await box.stats()).get("infra_errors", 0), 0
    for number in range(25):
        async with box.session() as session:
            forged += (await session.exec(later.format(wait=0.0005 * (number % 5)))).status is Status.ERROR
            with pytest.raises(SessionError) as caught:
                for _ in range(2000):
                    result = await session.exec("1")
                    forged += result.status is Status.ERROR
            assert caught.value.code == "session_ended", caught.value
    assert forged < 25  # some were caught while nothing ran
    assert (await box.stats()).get("infra_errors", 0) == before


# --- numbered executions ------------------------------------------------------------------------------------------


async def test_a_repeated_step_runs_once(box: LocalSandbox) -> None:
    async with box.session() as session:
        count = "n = globals().get('n', 0) + 1\nprint(n)"
        first = await session.exec(count, expect_step=1)
        assert (first.stdout, first.step) == ("1\n", 1)
        assert await session.exec(count, expect_step=1) == first
        assert (await session.exec(count, expect_step=2)).stdout == "2\n"
        assert "another program" in str(await refused("step_conflict", session.exec("other", expect_step=2)))
        for step in (0, -1, 4, 99):
            await refused("step_conflict", session.exec(count, expect_step=step))
        assert (await session.exec(count)).step == 3


async def test_a_repeat_of_the_running_step_attaches(box: LocalSandbox) -> None:
    async with box.session() as session:
        slow = "import time; time.sleep(0.4)\nn = globals().get('n', 0) + 1\nprint(n)"
        tasks = [asyncio.create_task(session.exec(slow, expect_step=1)) for _ in range(5)]
        await asyncio.sleep(0.15)
        await refused("busy", session.exec(slow))
        await refused("busy", session.exec("1", expect_step=2))
        await refused("step_conflict", session.exec("1", expect_step=3))
        await refused("busy", session.list_files())
        await refused("busy", session.fork())
        results = await asyncio.gather(*tasks)
        assert all(result == results[0] for result in results) and results[0].stdout == "1\n"


async def test_a_cancelled_call_with_a_step_can_be_taken_up_again(box: LocalSandbox) -> None:
    async with box.session() as session:
        slow = "import time; time.sleep(0.5)\nn = globals().get('n', 0) + 1\nprint(n)"
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.1):
                await session.exec(slow, expect_step=1)
        assert (await session.exec(slow, expect_step=1)).stdout == "1\n"


async def test_a_cancelled_call_without_a_step_is_interrupted(box: LocalSandbox) -> None:
    async with box.session() as session:
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await session.exec("kept = 1\nimport time; time.sleep(60)", limits=LONG)
        result = await session.exec("print(kept)")  # waits until that has ended
        assert (result.stdout, result.step) == ("1\n", 2)
        assert (await session.exec("kept = 1\nimport time; time.sleep(60)", expect_step=1)).status is Status.CANCELLED


async def test_whatever_comes_after_a_cancelled_call_finds_the_session_free(box: LocalSandbox) -> None:
    async with box.session() as session:

        async def give_up() -> None:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await session.exec("import time; time.sleep(60)", limits=LONG)

        await session.exec("kept = 1")
        await give_up()
        snapshot = await session.snapshot()
        await give_up()
        (branch,) = await session.fork()
        await give_up()
        await session.restore(snapshot)
        await give_up()
        assert await session.list_files() == []
        assert (await branch.exec("print(kept)")).stdout == "1\n"
        await branch.close()
        await give_up()  # closing waits for nothing


async def test_results_are_kept_for_a_while_only(box: LocalSandbox) -> None:
    async with box.session() as session:
        for step in range(1, 71):
            await session.exec(f"print({step})", expect_step=step)
        assert (await session.exec("print(70)", expect_step=70)).stdout == "70\n"
        assert "no longer kept" in str(await refused("step_conflict", session.exec("print(1)", expect_step=1)))


async def test_code_that_never_ran_is_no_step(box: LocalSandbox) -> None:
    async with box.session() as session:
        for code in ("\ud800", "x" * (1024 * 1024 + 1)):
            result = await session.exec(code)
            assert (result.status, result.step) == (Status.REJECTED, 0) and result.stderr
        assert (await session.exec("1")).step == 1


# --- interrupts ---------------------------------------------------------------------------------------------------


async def test_interrupt_raises_where_the_code_is(box: LocalSandbox) -> None:
    async with box.session() as session:
        assert await session.interrupt() is False
        task = asyncio.create_task(session.exec("x = 5\nprint('on', flush=True)\nwhile True: pass", limits=LONG))
        await asyncio.sleep(0.2)
        assert await session.interrupt() is True
        result = await task
        assert (result.status, result.stdout, result.alive) == (Status.ERROR, "on\n", True)
        assert result.exception is not None and result.exception.type == "KeyboardInterrupt"
        assert (await session.exec("print(x)")).stdout == "5\n"


async def test_an_interrupt_before_the_first_execution_has_begun(box: LocalSandbox) -> None:
    for delay in (0.0, 0.0005, 0.001, 0.002) * 3:
        async with box.session() as session:
            task = asyncio.create_task(session.exec("n = sum(range(20000))", limits=Limits(wall_s=0.001)))
            await asyncio.sleep(delay)
            await session.interrupt()
            assert (await task).alive
            assert (await session.exec("print(1)")).stdout == "1\n"


async def test_interrupts_at_any_moment_leave_a_working_session(box: LocalSandbox) -> None:
    async with box.session() as session:
        for round_ in range(60):
            task = asyncio.create_task(session.exec(f"n = {round_}\nsum(range(20000))\nn"))
            await asyncio.sleep(round_ % 7 * 0.0002)
            await session.interrupt()
            result = await task
            assert result.status in (Status.OK, Status.ERROR) and result.alive, result
        assert (await session.exec("print(n)")).stdout == "59\n"


# --- rich results -------------------------------------------------------------------------------------------------


async def test_rich_results_go_to_display(box: LocalSandbox) -> None:
    async with box.session() as session:
        plain = await session.exec("x = 3\nx", rich=True)
        assert (plain.stdout, plain.display) == ("", ({"text/plain": "3"},))
        code = (
            "class R:\n def __repr__(self): return 'R!'\n def _repr_html_(self): return '<b>R</b>'\n"
            " def _repr_png_(self): return b'PNG'\n def _repr_svg_(self): raise ValueError\n"
            " def _repr_latex_(self): return 'y' * 10**8\nR()"
        )
        assert (await session.exec(code, rich=True)).display == (
            {"text/plain": "R!", "text/html": "<b>R</b>", "image/png": "UE5H"},
        )
        assert (await session.exec("None", rich=True)).display == ()
        bad = "class B:\n def __repr__(self): raise KeyError\nB()"
        assert (await session.exec(bad, rich=True)).status is Status.OK
        slow = "class S:\n def __repr__(self):\n  while True: pass\nS()"
        assert (await session.exec(slow, rich=True, limits=IMPATIENT)).status is Status.TIMEOUT
        assert (await session.exec("print('a')\n'b'", rich=True)).stdout == "a\n"
    once = await box.exec("import sympy\nsympy.Symbol('x') ** 2", rich=True)
    assert (once.stdout, once.display[0]["text/plain"]) == ("", "x**2")


async def test_sessions_are_sessions(box: LocalSandbox) -> None:
    session = await box.session()
    assert isinstance(session, Session)
    assert (await box.attach(session.id)).id == session.id
    await session.close()
    await session.close()
    for call in (session.exec("1"), box.attach(session.id), session.interrupt()):
        await refused("no_session", call)
    await refused("no_session", box.attach("nobody"))
