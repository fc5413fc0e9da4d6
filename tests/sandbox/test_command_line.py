"""`retool sandbox run` and `serve`: what they take, what they refuse, and where their output goes."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sandbox.serving import ROOT


def sandbox(*options: str, **more: object) -> subprocess.CompletedProcess[str]:
    """Run `retool sandbox ...` to its end."""
    command = [sys.executable, "-m", "retool", "sandbox", *options]
    where = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **more}
    return subprocess.run(command, cwd=ROOT, text=True, timeout=60, **where)  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(
    "options",
    [
        ["run", "1", "--wall", "inf"],
        ["run", "1", "--wall", "nan"],
        ["run", "1", "--memory", "99999999999"],
        ["run", "1", "--profile", "py-nonsense"],
        ["serve", "--workers", "100000"],
        ["serve", "--max-sessions", "100000000"],
        ["serve", "--wall", "inf"],
        ["serve", "--max-wall", "inf"],
        ["serve", "--uds-mode", "rw-"],
    ],
)
def test_nonsense_is_refused_in_a_few_lines(options: list[str]) -> None:
    done = sandbox(*options)
    assert done.returncode == 2 and options[-2] in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 12


def test_a_limit_of_open_files_that_is_too_low_is_named() -> None:
    low = (512, 512)
    done = sandbox("run", "1", preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, low))
    assert done.returncode == 2 and "ulimit -Hn" in done.stderr and "512" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 4


def test_code_from_standard_input_may_begin_with_a_mark(tmp_path: Path) -> None:
    file = tmp_path / "code.py"
    file.write_bytes(b"\xef\xbb\xbfprint('\xc3\xa4')")
    with file.open() as code:
        done = sandbox("run", "-", "--profile", "auto", stdin=code)
    assert (done.returncode, done.stdout) == (0, "ä\n"), done.stderr


def test_output_that_the_terminal_cannot_show_is_escaped() -> None:
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    done = sandbox("run", "print('\\u03c0')", "--profile", "py-bare", env=environment)
    assert (done.returncode, done.stdout) == (0, "\\u03c0\n"), done.stderr


COMMANDS = {
    "run": ["run", "print('x' * 10000)", "--profile", "py-bare"],
    "doctor": ["doctor"],
    "attack": ["attack", "--only", "#15"],
    "attack as JSON": ["attack", "--only", "#15", "--json"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
@pytest.mark.parametrize("closed", ["pipe", "full"])
def test_output_that_nobody_takes_is_no_traceback(closed: str, command: list[str]) -> None:
    if closed == "pipe":
        near, far = os.pipe()
        os.close(near)
    else:
        far = os.open("/dev/full", os.O_WRONLY)
    try:
        done = sandbox(*command, stdout=far)
    finally:
        os.close(far)
    assert done.returncode == 1 and "Traceback" not in done.stderr, done.stderr
    assert ("No space left" in done.stderr) == (closed == "full"), done.stderr


def test_a_working_folder_that_was_deleted_does_not_matter(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    leave = "import os, sys; os.chdir(sys.argv[1]); os.rmdir(sys.argv[1]); os.execv(sys.executable, sys.argv[2:])"
    command = ["-m", "retool", "sandbox", "run", "print(1)", "--profile", "py-bare"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", leave, str(folder), sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
    )
    assert (done.returncode, done.stdout) == (0, "1\n"), done.stderr


def test_what_was_rejected_ends_its_line() -> None:
    done = sandbox("run", "-", input="#" * (2 << 20))
    assert done.returncode == 1 and done.stderr.startswith("code of")
    assert done.stderr.splitlines()[1].startswith("rejected")


def test_closed_standard_streams_are_no_traceback() -> None:
    done = sandbox("run", "-", preexec_fn=lambda: os.close(0))
    assert done.returncode == 2 and "standard input is closed" in done.stderr, done.stderr
    done = sandbox("run", "print(1)", "--profile", "py-bare", preexec_fn=lambda: os.close(1))
    assert done.returncode == 1 and done.stderr == "the output cannot be written: it is closed\n"
    done = sandbox("run", "x = 1", "--profile", "py-bare", preexec_fn=lambda: os.closerange(0, 3))
    assert done.returncode == 0


def test_standard_input_that_never_ends_is_refused() -> None:
    with Path("/dev/zero").open() as zeros:
        done = sandbox("run", "-", stdin=zeros)
    assert done.returncode == 2 and "standard input: more than 33554432 bytes" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
