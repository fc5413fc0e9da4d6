"""`retool sandbox bench`: parts measured at different times in one report, and what it refuses."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.sandbox.serving import ROOT, eventually


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "retool", "sandbox", "bench", *options], cwd=ROOT, capture_output=True, text=True
    )


def test_parts_are_measured_one_at_a_time_and_kept(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    common = ("--quick", "--seconds", "0.5", "--output", str(report), "--update")
    first = bench("--part", "overload", *common)
    assert first.returncode == 0, first.stderr
    earlier = json.loads(report.read_bytes())
    assert earlier["overload"]["peak"]["ok"] > 0 and set(earlier["overload"]["overload"]["other"]) <= {"refused"}
    assert list(earlier["speed"]) == ["overload"] and min(earlier["speed"]["overload"]) > 0
    second = bench("--part", "sessions", *common)
    assert second.returncode == 0, second.stderr
    both = json.loads(report.read_bytes())
    assert both["overload"] == earlier["overload"] and both["speed"]["overload"] == earlier["speed"]["overload"]
    assert 0 < both["sessions"]["exec"]["p50_ms"] <= both["sessions"]["exec"]["p95_ms"]
    assert 0 < both["sessions"]["idle"]["private_dirty_mib_each"] < 100
    for different in (("--seconds", "1"), ("--tier", "self")):
        other = bench("--part", "sessions", *common, *different)
        assert other.returncode == 2 and "was measured with" in other.stderr
    assert json.loads(report.read_bytes()) == both


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--update"], "--output"),
        (["--update", "--output", "{nonsense}"], "no report of this command"),
        (["--part", "lunch"], "choose from embedded, http"),
        (["--tier", "best"], "choose from ns"),
        (["--output", "{folder}"], "that is a folder"),
        (["--output", "/proc/report.json"], "/proc/report.json"),
        (["--vs", "nonsense"], "write a URL"),
        (["--vs", "https://127.0.0.1"], "without TLS"),
        (["--vs", "http://127.0.0.1:1"], "http://127.0.0.1:1"),
        (["--vs", "http://127.0.0.1:99999"], "http://127.0.0.1:99999"),
        (["--vs", "http://127.0.0.1:1", "--part", "sessions"], "--part http"),
    ],
)
def test_what_cannot_be_measured_is_said_in_a_line(options: list[str], words: str, tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.json"
    nonsense.write_text("{}")
    found = bench(*(option.format(nonsense=nonsense, folder=tmp_path) for option in options))
    assert found.returncode == 2
    assert words in found.stderr and "Traceback" not in found.stderr


def test_an_interrupt_is_for_the_command_alone() -> None:
    command = [sys.executable, "-m", "retool", "sandbox", "bench", "--quick", "--part", "embedded", "--seconds", "0.5"]
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    )

    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    assert eventually(lambda: bool(children.read_text()))  # cold interpreters, whose speed is measured first
    os.killpg(process.pid, signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors, errors.decode()
