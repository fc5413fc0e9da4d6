"""Real processes, really killed: what dies with what, what comes back, and that nothing is left."""

# ruff: noqa: E501, ASYNC240 (programs on one line; tests may block)
from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from sandbox import Limits, LocalSandbox, SandboxInfraError, SandboxUnavailable, Status
from tests.sandbox.conftest import ROOT, processes

PATIENT = Limits(wall_s=120, cpu_s=60)


async def until(condition: object, what: str) -> None:
    """Poll a callable until it is true."""
    for _ in range(1000):
        if condition():  # type: ignore[operator]
            return
        await asyncio.sleep(0.02)
    raise AssertionError(f"waited 20 s for: {what}")


def sleeper(tag: str) -> str:
    """Code that becomes a process one can find by its command line."""
    return f"import os; os.execv('/bin/sleep', ['/bin/sleep', '{tag}'])"


async def test_a_child_killed_from_outside_is_our_failure_and_the_next_run_works() -> None:
    async with LocalSandbox("py-bare", PATIENT, workers=2) as box:
        run = asyncio.create_task(box.exec(sleeper("71001.1")))
        neighbour = asyncio.create_task(box.exec("import time; time.sleep(1); print('fine')"))
        await until(lambda: processes("sleep 71001.1"), "the run")
        os.kill(processes("sleep 71001.1")[0], signal.SIGKILL)
        with pytest.raises(SandboxInfraError) as caught:
            await run
        assert caught.value.retryable and caught.value.code in ("lost_child", "oom_host")
        assert (await neighbour).stdout == "fine\n"
        stats = await box.stats()
        assert (stats["restarts"], stats["infra_errors"], stats["leaked"]) == (0, 1, 0)


@pytest.mark.parametrize("victim", ["zygote_pid", "warden_pid"])
async def test_a_dead_warm_unit_is_replaced(victim: str) -> None:
    async with LocalSandbox("py-bare", PATIENT, workers=2) as box:
        run = asyncio.create_task(box.exec(sleeper("71002.2")))
        await until(lambda: processes("sleep 71002.2"), "the run")
        os.kill((await box.stats())[victim], signal.SIGKILL)
        with pytest.raises(SandboxInfraError) as caught:
            await run
        assert caught.value.retryable and caught.value.code == "lost_child"
        await until(lambda: not processes("sleep 71002.2"), "the run to die with its unit")
        assert (await box.exec("print(1)")).stdout == "1\n"
        stats = await box.stats()
        assert stats["restarts"] == 1 and stats["leaked"] == 0 and stats["infra:lost_child"] == 1


async def test_a_dead_supervisor_is_replaced_and_leaves_nothing() -> None:
    async with LocalSandbox("py-bare", PATIENT, workers=2) as box:
        run = asyncio.create_task(box.exec(sleeper("71003.3")))
        await until(lambda: processes("sleep 71003.3"), "the run")
        assert box._link is not None
        folder = box._link.folder
        os.kill((await box.stats())["supervisor_pid"], signal.SIGKILL)
        with pytest.raises(SandboxUnavailable) as caught:
            await run
        assert caught.value.retryable
        await until(lambda: not processes("sleep 71003.3") and not processes(folder), "everything to die")
        assert (await box.exec("print(1)")).stdout == "1\n"
        stats = await box.stats()
        assert stats["supervisor_restarts"] == 1 and stats["unavailable"] == 1
        assert not Path(folder).exists()


CLIENT = """
import asyncio, os, sys
sys.path.insert(0, {root!r})
from sandbox import LocalSandbox, Limits
async def main():
    async with LocalSandbox("py-bare", Limits(wall_s=300, cpu_s=100), workers=2) as box:
        if {forks} and os.fork() == 0:
            import time; time.sleep(60)
            os._exit(0)
        print(box._link.folder, flush=True)
        code = "import os, subprocess; subprocess.Popen(['/bin/sleep', '71004.4'], start_new_session=True); "
        await box.exec(code + {code!r})
asyncio.run(main())
"""


@pytest.mark.parametrize("forks", [False, True])
async def test_everything_dies_with_the_client(forks: bool) -> None:
    """Also when the client has forked a process that still holds the socket: a data loader, for example."""
    source = CLIENT.format(root=str(ROOT), forks=forks, code=sleeper("71004.4"))
    with subprocess.Popen(  # noqa: ASYNC220
        [sys.executable, "-c", source], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as client:
        assert client.stdout is not None
        folder = (await asyncio.to_thread(client.stdout.readline)).strip()
        await until(lambda: len(processes("sleep 71004.4")) == 2, "the run and its daemon")
        assert len(processes(folder)) >= 3
        client.kill()
        await until(lambda: not processes("sleep 71004.4") and not processes(folder), "everything to die")
        if forks:
            os.killpg(client.pid, signal.SIGKILL)


async def test_closing_with_runs_under_way_leaves_nothing() -> None:
    async with LocalSandbox("py-bare", PATIENT, workers=2) as box:
        assert box._link is not None
        folder = box._link.folder
        runs = [asyncio.create_task(box.exec(sleeper("71005.5"))) for _ in range(4)]
        await until(lambda: processes("sleep 71005.5"), "a run")
    assert not processes("sleep 71005.5") and not processes(folder)
    results = await asyncio.gather(*runs, return_exceptions=True)
    assert all(isinstance(result, SandboxUnavailable) for result in results)


MIX = [
    ("print('ok')", Status.OK),
    ("1/0", Status.ERROR),
    ("import os; os._exit(5)", Status.EXIT),
    ("import os; os.abort()", Status.SIGNAL),
    ("x = bytearray(1 << 40)", Status.MEMORY_LIMIT),
    ("while True: print('y' * 10_000)", Status.OUTPUT_LIMIT),
    ("import sympy; print(sympy.expand((sympy.Symbol('x') + 1)**3))", Status.OK),
    ("import os\nfor _ in range(5):\n  if os.fork() == 0:\n    import time; time.sleep(99)", Status.OK),
    ("import subprocess; subprocess.Popen(['/bin/sleep', '71006.6'], start_new_session=True)", Status.OK),
    ("import time; time.sleep(99)", Status.TIMEOUT),
]


def descriptors(pid: int) -> int:
    """How many files a process has open."""
    return len(os.listdir(f"/proc/{pid}/fd"))  # noqa: PTH208


async def test_300_mixed_runs_leak_nothing() -> None:
    async with LocalSandbox("py-math", Limits(wall_s=60), workers=3) as box:
        assert box._link is not None
        await asyncio.gather(*(box.exec("print(1)") for _ in range(6)))
        await asyncio.sleep(0.5)
        stats = await box.stats()
        before = {name: descriptors(stats[name]) for name in ("supervisor_pid", "warden_pid", "zygote_pid")}
        alive = len(processes(box._link.folder))
        expected: Counter[Status] = Counter()
        calls = []
        for index in range(300):
            code, status = MIX[index % len(MIX)] if index % 3 == 0 else MIX[index % 2]
            expected[status] += 1
            wall = 0.3 if status is Status.TIMEOUT else 60.0
            calls.append(box.exec(code, limits=Limits(wall_s=wall)))
        results = await asyncio.gather(*calls)
        assert Counter(result.status for result in results) == expected
        await asyncio.sleep(0.5)
        stats = await box.stats()
        assert (stats["leaked"], stats["restarts"], stats.get("infra_errors", 0)) == (0, 0, 0)
        assert stats["executions"] == 306
        assert processes("sleep 71006.6") == []
        assert len(processes(box._link.folder)) <= alive + 2
        for name, count in before.items():
            assert descriptors(stats[name]) <= count + 12, name  # a ready child holds a few


@pytest.mark.parametrize("profile", ["py-bare"])
async def test_works_from_anywhere(tmp_path: Path, profile: str) -> None:
    """The supervisor loads this package from its own folder: spaces, decoys and PYTHONPATH change nothing."""
    tmp_path.chmod(0o755)
    home = tmp_path / "a folder with spaces"
    shutil.copytree(ROOT / "sandbox", home / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
    decoy = tmp_path / "decoy"
    decoy.mkdir()
    for name in ("sandbox.py", "socket.py", "sympy.py"):
        (decoy / name).write_text("raise SystemExit('a decoy was imported')")
    source = f"""
import socket, asyncio, sys
sys.path[:] = [{str(home)!r}, *(p for p in sys.path if p)]
import sandbox
from sandbox.tools import run_once
assert {str(home)!r} in sandbox.__file__
result = asyncio.run(run_once("import sandbox", profile={profile!r}))
assert result.exception.type == "ModuleNotFoundError", result
print(asyncio.run(run_once("print('works')", profile={profile!r})).stdout)
"""
    environment = {**os.environ, "PYTHONPATH": str(decoy), "PYTHONHOME": ""}
    environment.pop("PYTHONHOME")
    program = tmp_path / "program.py"
    program.write_text("import sys; sys.path.remove(sys.path[1])\n" + source)
    done = await asyncio.to_thread(
        subprocess.run, [sys.executable, str(program)], cwd=decoy, env=environment, capture_output=True, text=True
    )
    assert done.stdout == "works\n\n", done.stderr


async def test_works_from_a_virtual_environment_below_tmp_with_a_space(tmp_path: Path) -> None:
    """The private root covers /tmp; an interpreter that lives there must still be found."""
    tmp_path.chmod(0o755)
    place = tmp_path / "my env"
    await asyncio.to_thread(
        subprocess.run, [sys.executable, "-m", "venv", "--without-pip", "--symlinks", str(place)], check=True
    )
    source = f"""
import asyncio, sys
sys.path.insert(0, {str(ROOT)!r})
from sandbox.tools import run_once
code = "import subprocess, sys, csv; print(subprocess.run([sys.executable, '-c', 'print(40 + 2)'], capture_output=True))"
result = asyncio.run(run_once(code, profile="py-bare"))
assert "b'42" in result.stdout, result
print(sys.prefix, result.isolation)
"""
    done = await asyncio.to_thread(
        subprocess.run, [str(place / "bin/python"), "-c", source], capture_output=True, text=True
    )
    assert done.stdout.startswith(str(place)), done.stderr


async def test_a_forked_copy_refuses_to_share_the_sandbox() -> None:
    async with LocalSandbox("py-bare") as box:
        box._owner = -1  # what a forked process would see
        with pytest.raises(SandboxUnavailable, match="open another after a fork"):
            await box.exec("1")
        box._owner = os.getpid()


async def test_cancelling_in_every_phase_leaks_nothing() -> None:
    """Queued, being forked, running: whoever is cancelled leaves neither init nor child nor descriptor."""
    async with LocalSandbox("py-bare", PATIENT, workers=2) as box:
        assert box._link is not None
        await asyncio.gather(*(box.exec("print(1)") for _ in range(8)))  # as many namespaces as are ever kept
        await asyncio.sleep(0.3)
        stats = await box.stats()
        # Up to two more namespaces, of two descriptors each, may be kept for later; what 40 calls leak is more.
        before = descriptors(stats["supervisor_pid"]) + 4, len(processes(box._link.folder)) + 2
        for delay in (0.0, 0.001, 0.003, 0.01, 0.03):
            calls = [asyncio.create_task(box.exec("import time; time.sleep(60)")) for _ in range(8)]
            await asyncio.sleep(delay)
            for call in calls:
                call.cancel()
            await asyncio.gather(*calls, return_exceptions=True)
        assert (await box.exec("print(1)")).ok
        await until(lambda: len(processes(box._link.folder)) <= before[1], "processes to be gone")  # type: ignore[union-attr]
        await until(lambda: descriptors(stats["supervisor_pid"]) <= before[0], "descriptors to be closed")
        for _ in range(500):
            stats = await box.stats()
            if not stats["running"] and not stats["waiting"]:
                break
            await asyncio.sleep(0.02)
        assert (stats["leaked"], stats["restarts"], stats["running"], stats["waiting"]) == (0, 0, 0, 0)


_TWO_LOOPS = """
import asyncio
from pathlib import Path
from sandbox import LocalSandbox

box = LocalSandbox("py-bare", workers=1)

async def open_and_leave():
    await box.__aenter__()
    return (await box.exec("1")).status, (await box.stats())["supervisor_pid"]

async def again():
    async with box:
        return (await box.exec("3")).stdout

status, pid = asyncio.run(open_and_leave())
try:
    asyncio.run(box.exec("2"))
except RuntimeError as error:
    print(error)
asyncio.run(box.close())
print(Path(f"/proc/{pid}").exists(), asyncio.run(again()))
"""


def test_a_sandbox_belongs_to_its_event_loop_and_can_be_closed_after_it() -> None:
    done = subprocess.run([sys.executable, "-c", _TWO_LOOPS], cwd=ROOT, capture_output=True, text=True, timeout=60)
    said = done.stdout.splitlines()
    assert "another event loop" in said[0] and said[1] == "False 3", done.stderr
