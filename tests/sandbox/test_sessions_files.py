"""Files in and out: what callers may name, and what code inside can make of it."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox import FileInfo, Limits, LocalSandbox, SessionError, Status, paths
from sandbox.worker.jail import REPORT
from tests.sandbox.test_sessions import refused

pytestmark = pytest.mark.asyncio(loop_scope="module")
parts = st.sampled_from(["a", "b", "..", ".", "", "/", "\0", "é", "\udcff", "-rf", " ", "\n", "x" * 255, "x" * 256])


async def test_files_go_in_and_out(box: LocalSandbox) -> None:
    names = ["plain", "d/e/f.txt", "é \n", "-rf", "\udcff", "x" * 255]
    async with box.session() as session:
        for name in names:
            data = name.encode("utf-8", "surrogateescape") + bytes(range(256))
            await session.write_file(name, data)
            assert await session.read_file(name) == data
        listed = await session.list_files()
        assert listed == sorted(listed, key=lambda row: row.path) and {row.path for row in listed} == set(names)
        assert FileInfo("plain", 5 + 256) in listed
        await session.write_file("plain", b"shorter")
        result = await session.exec("print(open('plain').read(), open('d/e/f.txt', 'rb').read(9))")
        assert result.stdout == "shorter b'd/e/f.txt'\n"
        await session.write_file("big", b"x" * paths.MAX_BYTES)
        assert len(await session.read_file("big")) == paths.MAX_BYTES
        assert (await session.exec("1")).step == 2  # file work is no execution


@given(path=st.lists(parts, max_size=5).map("/".join) | st.text(max_size=20))
async def test_an_accepted_name_stays_inside(path: str) -> None:
    if paths.refusal(path):
        return
    assert not path.startswith("/") and "\0" not in path
    assert all(
        part not in ("", ".", "..") and len(part.encode("utf-8", "surrogateescape")) <= 255 for part in path.split("/")
    )


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/etc/passwd",
        "..",
        "../x",
        "a/../../x",
        "a//b",
        "./a",
        "a/.",
        "a/",
        "a\0b",
        "\ud800",
        "x" * 256,
        "a/" * 2100 + "a",
        ".branches/1/f",
    ],
)
async def test_bad_paths_are_refused_before_anything_happens(box: LocalSandbox, path: str) -> None:
    async with box.session() as session:
        for call in (session.write_file(path, b"x"), session.read_file(path)):
            await refused("bad_path", call)
        assert await session.list_files() == []
    for arguments in ({"files": {path: b"x"}}, {"fetch": [path]}):
        result = await box.exec("print('ran')", **arguments)  # type: ignore[arg-type]
        assert (result.status, result.stdout) == (Status.REJECTED, "") and "path" in result.stderr


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.lists(parts, min_size=1, max_size=4).map("/".join), data=st.binary(max_size=50))
async def test_any_path_works_or_is_refused(box: LocalSandbox, path: str, data: bytes) -> None:
    result = await box.exec("1", files={path: data}, fetch=[path])
    if result.status is Status.REJECTED:
        assert result.files == {}
    else:
        assert result.ok and result.files == {path: data}


async def test_only_regular_files_with_one_name_are_read(box: LocalSandbox) -> None:
    make = (
        "import os\nopen('f', 'w').write('x'); os.symlink('f', 'link'); os.symlink('/etc/passwd', 'out')\n"
        "os.symlink('/dev/zero', 'zero'); os.mkdir('d'); os.symlink('d', 'dlink'); open('d/f', 'w').write('y')\n"
        "os.link('f', 'hard'); os.symlink('/etc', 'etc')"
    )
    names = ["link", "out", "zero", "d", "f", "hard", "dlink/f", "etc/passwd", "missing", "f/x"]
    async with box.session() as session:
        assert (await session.exec(make)).ok
        for name in names:
            await refused("no_file", session.read_file(name))
        for name in ("link", "out", "etc/passwd", "d", "dlink/new"):
            with pytest.raises(SessionError):
                await session.write_file(name, b"evil")
        assert await session.read_file("d/f") == b"y"
        assert [row.path for row in await session.list_files()] == ["d/f", "f", "hard"]
        assert (await session.exec("print(open('f').read(), os.listdir('d'))")).stdout == "x ['f']\n"
    once = await box.exec(make, fetch=[*names, "d/f"])
    assert once.ok and once.files == {"d/f": b"y"}


async def test_swapping_file_and_link_while_fetching(box: LocalSandbox) -> None:
    """Thousands of swaps under the reader's hands: never a byte from outside, never a hang."""
    swap = (
        "import os, threading\nopen('own', 'w').write('own' * 100)\nopen('t', 'w').write('own' * 100)\n"
        "os.symlink('/etc/passwd', 'l')\n"
        "def loop():\n  while True:\n    for other in ('l', 't'):\n      try:\n"
        "        os.link(other, 'n', follow_symlinks=False)\n        os.rename('n', 'f')\n      except OSError: pass\n"
        "threading.Thread(target=loop, daemon=True).start()"
    )
    async with box.session(limits=Limits(wall_s=30)) as session:
        assert (await session.exec(swap)).ok
        outcomes = {"read": 0, "refused": 0}
        for _ in range(150):
            try:
                data = await session.read_file("f")
            except SessionError as error:
                assert error.code in ("no_file", "bad_path"), error
                outcomes["refused"] += 1
            else:
                assert data == b"own" * 100
                outcomes["read"] += 1
        assert outcomes["refused"] > 0


async def test_sizes_are_capped(box: LocalSandbox) -> None:
    async with box.session() as session:
        await refused("too_large", session.write_file("f", b"x" * (paths.MAX_BYTES + 1)))
        assert (await session.exec("f = open('sparse', 'wb'); f.truncate(16 << 20); f.close()")).ok
        assert len(await session.read_file("sparse")) == 16 << 20
        for number in range(5):
            try:
                await session.write_file(f"fill{number}", b"x" * paths.MAX_BYTES)
            except SessionError as error:
                assert error.code == "too_large"
                break
        assert (await session.exec("for n in range(1100): open(f'n{n}', 'w')")).ok
        await refused("too_large", session.list_files())
    many = await box.exec("1", files={str(number): b"" for number in range(1001)})
    assert many.status is Status.REJECTED and "1000 files" in many.stderr
    much = await box.exec("1", files={"a": b"x" * (9 << 20), "b": b"x" * (9 << 20)})
    assert much.status is Status.REJECTED and "16777216" in much.stderr


async def test_one_shot_files(box: LocalSandbox) -> None:
    code = "import os\nos.makedirs('out')\nopen('out/r', 'w').write(open('in/a').read().upper())\nos.chdir('/')"
    result = await box.exec(code, files={"in/a": b"text", "b": b""}, fetch=["out/r", "b", "none", "out"])
    assert result.ok and result.files == {"out/r": b"TEXT", "b": b""}
    failed = await box.exec("open('f', 'w').write('x')\n1/0", fetch=["f"])
    assert failed.status is Status.ERROR and failed.files == {"f": b"x"}
    for ending in ("import os; os.abort()", "import os; os._exit(0)", "import time; time.sleep(9)"):
        gone = await box.exec("open('f', 'w').write('x')\n" + ending, fetch=["f"], limits=Limits(wall_s=0.5))
        assert gone.files == {}
    conflict = await box.exec("print('ran')", files={"a": b"", "a/b": b""})
    assert (conflict.status, conflict.stdout) == (Status.REJECTED, "") and "a/b" in conflict.stderr


@pytest.mark.parametrize("status", [0, 7])
async def test_a_program_cannot_say_that_it_was_never_run(box: LocalSandbox, status: int) -> None:
    code = f"""
import json, os, struct
head = json.dumps({{"unwritten": "a: no room"}}).encode()
os.write({REPORT}, struct.pack("!cIII", b"D", 0, len(head), 0) + head)
os._exit({status})
"""
    result = await box.exec(code, files={"a": b"x"}, fetch=["a"])
    assert (result.exit_code, result.stderr, result.attested) == (status, "", True), result


async def test_files_while_threads_write(box: LocalSandbox) -> None:
    writer = (
        "import threading\ndef loop():\n  n = 0\n  while True:\n    n += 1; open('f', 'w').write('z' * (n % 5000))\n"
        "open('f', 'w').close()\nthreading.Thread(target=loop, daemon=True).start()"
    )
    async with box.session() as session:
        assert (await session.exec(writer)).ok
        for _ in range(30):
            assert set(await session.read_file("f")) <= {ord("z")}
            assert [row.path for row in await session.list_files()] == ["f"]
        await asyncio.gather(session.exec("1"), return_exceptions=True)
