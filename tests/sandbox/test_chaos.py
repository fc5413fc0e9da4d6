"""Things break while work is under way. Every affected request ends as a typed failure of ours; its retry, under the
same idempotency key, takes effect exactly once; then everything works and nothing is left."""

# ruff: noqa: ASYNC240 (tests may block)
from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from sandbox import ExecResult, Limits, LocalSandbox, SandboxError, SandboxInfraError, SandboxUnavailable, Status
from sandbox.battery.run import descendants
from sandbox.linux import syscalls as sys_
from tests.sandbox.conftest import ROOT, processes

pytestmark = pytest.mark.slow
LIMITS = Limits(wall_s=60, cpu_s=30)
RETRYABLE = {
    "lost_child",
    "spawn_failed",
    "jail_failed",
    "shutdown",
    "unavailable",
    "oom_host",
    "disk_full",
    "internal",
}


@asynccontextmanager
async def watched(tier: str | None = None) -> AsyncIterator[LocalSandbox]:
    """A sandbox; at the end no process of it, old or new, may be alive, and no folder."""
    async with LocalSandbox("py-bare", LIMITS, workers=2, tier=tier, allow_unconfined=tier == "none") as box:
        assert box._link is not None
        folders = [box._link.folder]
        yield box
        folders.append(box._link.folder)
    assert not any(processes(folder) for folder in folders)
    assert not any(Path(folder).exists() for folder in folders)


async def until_done(box: LocalSandbox, code: str, key: str, failures: Counter[str]) -> ExecResult:
    """Retry as a client should: only what says that it may be retried, always under the same key."""
    for _ in range(60):
        try:
            return await box.exec(code, idempotency_key=key)
        except SandboxError as error:
            assert error.retryable and error.code in RETRYABLE, error
            failures[error.code] += 1
            await asyncio.sleep(0.05)
    raise AssertionError(f"{key} was not done after 60 tries: {failures}")


def effect(folder: Path, name: int) -> str:
    """A program that takes a while and then leaves a mark outside: its effect can be counted."""
    return (
        f"import os, time\ntime.sleep(0.15)\n"
        f"fd = os.open({str(folder / 'effects')!r}, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)\n"
        f"os.write(fd, b'{name}\\n')\nprint({name})"
    )


VICTIMS = ("zygote_pid", "warden_pid", "supervisor_pid")


@pytest.mark.parametrize("victim", VICTIMS)
async def test_a_killed_process_of_ours_and_exactly_one_effect(victim: str, tmp_path: Path) -> None:
    """Unconfined, because only then an effect can be seen outside. A result is given once per key, and asking again
    gives the same one without running."""
    tmp_path.chmod(0o777)
    failures: Counter[str] = Counter()
    async with watched("none") as box:
        jobs = [asyncio.create_task(until_done(box, effect(tmp_path, n), f"key-{n}", failures)) for n in range(24)]
        for _ in range(2):
            await asyncio.sleep(0.5)
            os.kill((await box.stats())[victim], signal.SIGKILL)
        results = await asyncio.gather(*jobs)
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(24)]
        assert sum(failures.values()) >= 2, failures
        marks = Counter((tmp_path / "effects").read_text().split())
        assert set(marks) == {str(n) for n in range(24)}
        # Killed between the effect and our hearing of it, a program has run twice: never more often than we failed.
        assert sum(marks.values()) - 24 <= sum(failures.values())
        again = await asyncio.gather(*(box.exec(effect(tmp_path, n), idempotency_key=f"key-{n}") for n in range(24)))
        lost = 24 if victim == "supervisor_pid" else 0  # results live as long as the supervisor
        assert sum(a.digest != b.digest or a.usage != b.usage for a, b in zip(again, results, strict=True)) <= lost
        if not lost:
            assert Counter((tmp_path / "effects").read_text().split()) == marks
        assert (await box.exec("print(1)")).stdout == "1\n"
        assert (await box.stats())["leaked"] == 0


async def test_many_who_ask_under_one_key_share_one_run(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    failures: Counter[str] = Counter()
    async with watched("none") as box:
        jobs = [asyncio.create_task(until_done(box, effect(tmp_path, 7), "one", failures)) for _ in range(20)]
        await asyncio.sleep(0.05)
        os.kill((await box.stats())["zygote_pid"], signal.SIGKILL)
        results = await asyncio.gather(*jobs)
        assert {result.stdout for result in results} == {"7\n"}
        assert (tmp_path / "effects").read_text() == "7\n"
        assert len({result.usage.wall_ms for result in results}) == 1


@pytest.mark.parametrize("victim", VICTIMS)
async def test_confined_runs_survive_the_same(victim: str) -> None:
    failures: Counter[str] = Counter()
    code = "import os, time\nif os.fork() == 0:\n  os.setsid(); time.sleep(300)\ntime.sleep(0.1); print('done')"
    async with watched() as box:
        jobs = [asyncio.create_task(until_done(box, code, f"key-{n}", failures)) for n in range(16)]
        await asyncio.sleep(0.4)
        os.kill((await box.stats())[victim], signal.SIGKILL)
        assert {result.stdout for result in await asyncio.gather(*jobs)} == {"done\n"}
        assert sum(failures.values()) >= 1
        stats = await box.stats()
        assert stats["leaked"] == 0
        await asyncio.sleep(0.5)
        assert len(descendants(stats["supervisor_pid"])) <= 20


async def test_a_frozen_zygote_is_noticed_and_replaced() -> None:
    async with watched() as box:
        assert (await box.exec("print(1)")).ok
        zygote = (await box.stats())["zygote_pid"]
        os.kill(zygote, signal.SIGSTOP)
        failures: Counter[str] = Counter()
        short = [asyncio.create_task(until_done(box, f"print({n})", f"key-{n}", failures)) for n in range(6)]
        results = await asyncio.gather(*short)
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(6)]
        assert sum(failures.values()) >= 1 and (await box.stats())["zygote_pid"] != zygote
        assert not Path(f"/proc/{zygote}").exists()


@pytest.fixture
def small_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A file system of 24 MB and 600 files under all work folders."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small file system")
    disk = tmp_path / "disk"
    disk.mkdir()
    sys_.mount("tmpfs", str(disk), "tmpfs", 0, "size=24m,nr_inodes=600,mode=1777")
    for path in (disk, *tmp_path.parents[:-2], tmp_path):
        path.chmod(0o1777 if path == disk else 0o755)
    monkeypatch.setattr(tempfile, "tempdir", str(disk))
    try:
        yield disk
    finally:
        sys_.umount_detach(str(disk))


async def test_a_full_disk_is_the_filler_s_problem_and_passes(small_disk: Path) -> None:
    fill = (
        "import time\ndef fill():\n  n = 0\n  while True:\n"
        "    with open(f'f{n}', 'wb') as f: f.write(bytes({size}))\n    n += 1\n"
        "try: fill()\nexcept OSError as error: print(error.errno, flush=True)\ntime.sleep(1.5)"
    )
    for size in (4 << 20, 0):  # bytes, then files: then not even a work folder can be made
        async with watched("self") as box:
            assert (await box.exec("print(1)")).ok
            failures: Counter[str] = Counter()
            hostile = asyncio.create_task(box.exec(fill.replace("{size}", str(size))))
            await asyncio.sleep(0.7)
            others = [asyncio.create_task(until_done(box, f"print({n})", f"key-{n}", failures)) for n in range(8)]
            result = await hostile
            assert result.status is Status.OK and result.stdout == "28\n"  # ENOSPC
            assert [done.stdout for done in await asyncio.gather(*others)] == [f"{n}\n" for n in range(8)]
            again = await until_done(box, "open('mine', 'wb').write(bytes(1 << 20)); print('room')", "room", failures)
            assert again.stdout == "room\n" and (await box.stats())["leaked"] == 0
        assert list(small_disk.iterdir()) == []


async def test_a_disk_that_others_filled_is_our_failure(small_disk: Path) -> None:
    write = "open('mine', 'wb').write(bytes(1 << 20))"
    async with watched("self") as box, box.session() as session:
        full = await box.exec("n = 0\nwhile True:\n  open(f'f{n}', 'wb').write(bytes(4 << 20)); n += 1")
        assert full.status is Status.ERROR and full.exception and "No space" in full.exception.message  # its own doing
        while list(small_disk.rglob("f0")):  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        filler = small_disk / "filler"
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize)
        assert (await box.exec("print(1)")).stdout == "1\n"
        for work in (
            box.exec("1", files={"data.bin": bytes(1 << 20)}),
            box.exec(write),
            session.write_file("data.bin", bytes(1 << 20)),
        ):
            with pytest.raises(SandboxInfraError) as caught:
                await work
            assert caught.value.code == "disk_full" and caught.value.retryable
        filler.unlink()
        assert (await box.exec(write, files={"data.bin": bytes(1 << 20)})).ok
        await session.write_file("data.bin", bytes(1 << 20))


async def test_a_sandbox_that_starts_on_a_full_disk_says_so(small_disk: Path) -> None:
    (small_disk / "filler").touch()
    async with watched("self") as box:
        await box.exec("1")
        os.posix_fallocate(
            file := os.open(small_disk / "filler", os.O_WRONLY),
            0,
            os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize,
        )
        os.close(file)
        os.kill((await box.stats())["supervisor_pid"], signal.SIGKILL)
        codes = set()
        for _ in range(4):
            with pytest.raises(SandboxError) as caught:
                await box.exec("print(2)")
            codes.add(caught.value.code)
            assert caught.value.retryable, caught.value
        assert codes <= {"unavailable", "disk_full"}, codes
        (small_disk / "filler").unlink()
        assert (await box.exec("print(3)")).stdout == "3\n"


CLIENT = """
import asyncio, os, resource, signal, sys
sys.path.insert(0, {root!r})
from sandbox import LocalSandbox, SandboxUnavailable
async def main():
    async with LocalSandbox("py-bare", workers=2) as box:
        assert (await box.exec("print(1)")).ok
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        held = []
        try:
            while True: held.append(os.open("/dev/null", 0))
        except OSError: pass
        assert (await box.exec("print(2)")).stdout == "2\\n"  # an open sandbox needs no more descriptors
        os.kill((await box.stats())["supervisor_pid"], signal.SIGKILL)
        names = set()
        for _ in range(3):
            try: await box.exec("print(3)")
            except SandboxUnavailable as error: names.add(type(error).__name__)
        for fd in held: os.close(fd)
        assert names == {{"SandboxUnavailable"}}, names
        assert (await box.exec("print(4)")).stdout == "4\\n"
    print("fine")
asyncio.run(main())
"""


async def test_a_client_without_descriptors() -> None:
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-W", "error", "-c", CLIENT.format(root=str(ROOT))],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.stdout == "fine\n", done.stderr[-3000:]


async def test_a_supervisor_without_descriptors() -> None:
    async with watched() as box:
        assert (await box.exec("print(1)")).ok
        pid = (await box.stats())["supervisor_pid"]
        before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (8, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        failures: Counter[str] = Counter()
        jobs = [asyncio.create_task(until_done(box, f"print({n})", f"key-{n}", failures)) for n in range(8)]
        await asyncio.sleep(1)
        assert sum(failures.values()) >= 1  # a typed failure, not silence
        resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
        results = await asyncio.gather(*jobs)
        assert [result.stdout for result in results] == [f"{n}\n" for n in range(8)]
        assert (await box.stats())["leaked"] == 0


async def test_closing_in_the_middle_of_a_storm() -> None:
    async with watched() as box:
        code = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
        storm = [asyncio.create_task(box.exec(code, limits=Limits(wall_s=30, processes=8))) for _ in range(4)]
        await asyncio.sleep(0.6)
    ends = await asyncio.gather(*storm, return_exceptions=True)
    assert all(isinstance(end, (SandboxUnavailable, SandboxInfraError)) for end in ends), ends
