"""Shared by all tests: a skipped test must be on the committed list, and its reason is printed."""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path

import pytest

ALLOWED = Path(__file__).parent / "allowed_skips.txt"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def allowed_skips() -> list[str]:
    """Patterns of test ids that may skip; `#` starts a comment that says why."""
    lines = (line.split("#")[0].strip() for line in ALLOWED.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Whole runs first: where two processes share the files, none is left alone with the long ones at the end."""
    items.sort(key=lambda item: "tests/system/" not in item.nodeid)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    skipped = terminalreporter.stats.get("skipped", [])
    terminalreporter.write_line(f"skips: {len(skipped)}")
    for report in skipped:
        if not any(fnmatch.fnmatch(report.nodeid, pattern) for pattern in allowed_skips()):
            terminalreporter.write_line(f"skip not on {ALLOWED.name}: {report.nodeid}: {report.longrepr}", red=True)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A skip that is not on the list fails the run (exit code 1), and so does a run of no test (pytest's 5)."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if reporter is None or hasattr(session.config, "workerinput"):
        return
    unlisted = [
        r for r in reporter.stats.get("skipped", []) if not any(fnmatch.fnmatch(r.nodeid, p) for p in allowed_skips())
    ]
    if unlisted and exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
