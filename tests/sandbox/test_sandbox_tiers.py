"""Every tier on a host that has no better one, made for real out of this one."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox import ConfinementUnavailable, LocalSandbox, SandboxInfraError
from sandbox.linux import syscalls as sys_
from sandbox.supervisor import folders
from sandbox.supervisor import pool as pool_module
from sandbox.supervisor.pool import Pool
from sandbox.supervisor.settings import Settings
from sandbox.tiers import BY_NAME
from sandbox.tools import capability_table
from tests.sandbox import other_host

PROGRAM = Path(__file__).with_name("tier_program.py")
UID = BY_NAME["uid"]
HOSTS = {"ns": "user", "uid": "container", "self": "capless"}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make itself another kind of host")


@pytest.fixture(scope="module", params=HOSTS)
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What happened in tier `request.param`."""
    if os.geteuid() != 0:
        pytest.skip("only root can make itself another kind of host")
    os.environ["RETOOL_TEST_TIER"] = request.param
    try:
        done = other_host.run(HOSTS[request.param], PROGRAM)
    finally:
        del os.environ["RETOOL_TEST_TIER"]
    assert done.returncode == 0, done.stderr
    result = dict(json.loads(done.stdout.splitlines()[-1]))
    assert result["tier"] == request.param
    return result


def test_outcomes_are_the_same_in_every_tier(seen: dict[str, Any]) -> None:
    expected = {
        "ok": ["ok", "", "42\n"],
        "error": ["error", "ZeroDivisionError", ""],
        "abort": ["signal", "", ""],
        "cpu": ["cpu_limit", "", ""],
        "timeout": ["timeout", "", ""],
        "memory": ["memory_limit", "MemoryError", ""],
    }
    for name, outcome in expected.items():
        assert seen[name] == [*outcome, seen["tier"]], name
    assert seen["output"][0] == "output_limit"
    assert seen["after"] == "1\n"


def test_processes_are_capped_and_all_gone(seen: dict[str, Any]) -> None:
    if seen["tier"] == "self":
        assert seen["forks"][2] == "0 1\n"  # no process may be made at all: EPERM at the first
        assert seen["daemon"][:2] == ["error", "PermissionError"] and seen["sub"][0] == "error"
    else:
        # The second time as well: an id whose zombies were not reaped would refuse earlier.
        assert seen["forks"][2] == seen["forks again"][2] == "11 11\n"
        assert seen["daemon"][0] == "ok" and seen["sub"][2] == "b'hi\\n'\n"
    assert seen["threads"] == ["ok", "ok"]  # at the same time: nobody uses up what is another's
    assert seen["storm"][0] in ("timeout", "cpu_limit")
    assert (seen["sleepers"], seen["leaked"], seen["restarts"]) == (0, 0, 0)


def test_nothing_outside_is_signalled_or_read(seen: dict[str, Any]) -> None:
    assert seen["self kill"][:2] == ["error", "PermissionError"]
    assert seen["kill client"][:2] in (["error", "PermissionError"], ["error", "ProcessLookupError"])
    assert seen["kill all"][0] in ("ok", "error")
    assert seen["proc"][:2] in (["error", "PermissionError"], ["error", "FileNotFoundError"])
    assert seen["chmod"][0] == "error"
    if seen["tier"] != "ns":  # there /dev/shm is the run's own folder
        assert seen["others"][:2] == seen["shm"][:2] == ["error", "PermissionError"]
    assert "mine" not in seen["peek"]


def test_nothing_is_left_behind(seen: dict[str, Any]) -> None:
    assert seen["deep"][0] in ("ok", "error") and seen["folders"] and seen["removed"]
    assert seen["locked"][0] == ("error" if seen["tier"] == "self" else "ok")  # where modes cannot be changed
    if seen["tier"] != "self":
        assert seen["supervisor killed"] == "unavailable" and seen["survivors"] == 0


@as_root
def test_folders_within_folders_that_nobody_may_enter_are_removed(open_folder: Path) -> None:
    place = open_folder / "1"
    place.mkdir()
    os.chown(place, 4_000_000, 4_000_000)
    nest = (
        "mkdir -p a/b/c/d/e/f/g; for d in a/b/c/d/e/f/g a/b/c/d/e/f a/b/c/d/e a/b/c/d a/b/c a/b a; do chmod 0 $d; done"
    )
    subprocess.run(["/bin/sh", "-c", nest], check=True, cwd=place, user=4_000_000, group=4_000_000)
    assert folders.remove(str(place), 4_000_000) and not place.exists()


@as_root
async def test_what_cannot_be_removed_is_counted_and_tried_again(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    pool = Pool(Settings(), UID, 4_000_000, counts)
    uid = pool._free_uids.popleft()
    (tmp_path / "1").mkdir()
    sys_.mount("tmpfs", str(tmp_path / "1"), "tmpfs", 0, "")
    try:
        task = asyncio.create_task(pool._clear(str(tmp_path / "1"), uid, None, dead=True))
        while not counts["leaked"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert uid not in pool._free_uids
    finally:
        subprocess.run(["umount", str(tmp_path / "1")], check=True)  # noqa: ASYNC221
    await task
    assert not (tmp_path / "1").exists() and counts["leaked"] == 0 and pool._free_uids[-1] == uid


async def test_a_run_does_not_wait_for_a_user_id_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool_module, "UID_WAIT_S", 0.05)
    pool = Pool(Settings(), UID, 4_000_000, Counter())
    pool._free_uids.clear()
    with pytest.raises(SandboxInfraError, match="user id") as caught:
        await pool._take_uid()
    assert caught.value.retryable


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that other users can reach."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


REFUSED = """
import asyncio
from sandbox import LocalSandbox, ConfinementUnavailable
async def main():
    try:
        async with LocalSandbox("py-bare"): print("opened")
    except ConfinementUnavailable as error:
        print(type(error).__name__, error.retryable, error)
    async with LocalSandbox("py-bare", allow_unconfined=True) as box:
        print((await box.exec("print(1)")).isolation)
asyncio.run(main())
"""


@as_root
def test_a_host_that_can_confine_nothing_is_refused(open_folder: Path) -> None:
    program = open_folder / "refused.py"
    program.write_text(REFUSED)
    done = other_host.run("locked", program)
    assert done.stdout.startswith("ConfinementUnavailable False no isolation tier holds on this machine"), done.stderr
    assert "landlock_create_ruleset" in done.stdout and "allow_unconfined=True" in done.stdout
    assert done.stdout.endswith("\nnone\n")


async def test_no_confinement_only_on_request() -> None:
    with pytest.raises(ConfinementUnavailable, match="allow_unconfined=True"):
        async with LocalSandbox("py-bare", tier="none"):
            pass


def test_a_hole_in_a_tier_is_found_by_the_attacks(tmp_path: Path) -> None:
    """The control of the prober itself: a copy of the package whose jail has a hole must not start."""
    root = Path(__file__).resolve().parents[2]
    holes = {
        "files": ("worker/jail.py", "if landlock.abi() or", "if landlock.abi() and self._tier.name != 'self' and not"),
        "seccomp": ("worker/jail.py", "self._filter.install()", "self._tier.name == 'self' or self._filter.install()"),
    }
    reasons = {"files": "read files outside", "seccomp": "send datagrams, make system calls"}
    for name, (file, old, new) in holes.items():
        place = tmp_path / name
        shutil.copytree(root / "sandbox", place / "sandbox", ignore=shutil.ignore_patterns("__pycache__"))
        text = (place / "sandbox" / file).read_text()
        assert old in text
        (place / "sandbox" / file).write_text(text.replace(old, new))
        source = f"""
import asyncio, sys
sys.path.insert(0, {str(place)!r})
from sandbox import LocalSandbox
async def main():
    async with LocalSandbox("py-bare", tier="self"): print("opened")
asyncio.run(main())
"""
        done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, cwd=tmp_path)
        assert "opened" not in done.stdout and reasons[name] in done.stderr, (name, done.stdout, done.stderr[-600:])


def test_capability_table_names_every_tier() -> None:
    rows = {row["name"]: row for row in capability_table()}
    assert {"landlock", "tier ns", "tier uid", "tier self"} <= set(rows)
    assert any(rows[f"tier {name}"]["available"] for name in HOSTS)
    assert all(row["detail"] and (row["available"] or row["fix"]) for row in rows.values())


KILL_AS_ROOT = """
from sandbox.worker import warden
try:
    warden._kill_as(0)
except ValueError as error:
    print(error)
"""


@as_root
def test_nobody_is_killed_in_the_name_of_root() -> None:
    """In a process namespace of its own, where the worst that could happen is the end of this program."""
    done = subprocess.run(
        ["unshare", "--pid", "--fork", "--kill-child", sys.executable, "-c", KILL_AS_ROOT],
        capture_output=True,
        text=True,
        cwd=PROGRAM.parents[2],
        timeout=60,
    )
    assert "would kill everything" in done.stdout, done


@pytest.mark.parametrize("counts", [{"workers": -1}, {"workers": 1.5}, {"queue": -1}, {"max_sessions": "many"}])
def test_counts_that_are_none_are_refused(counts: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(counts))):
        LocalSandbox("py-bare", **counts)


@as_root
async def test_more_workers_than_there_are_user_ids_are_refused() -> None:
    with pytest.raises(ConfinementUnavailable, match="too many workers"):
        async with LocalSandbox("py-bare", workers=100_000):
            pass
