"""Sessions in every tier, on a host that has no better one, made for real out of this one."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.sandbox import other_host
from tests.sandbox.test_sandbox_tiers import HOSTS

PROGRAM = Path(__file__).with_name("session_tier_program.py")


@pytest.fixture(scope="module", params=HOSTS)
def seen(request: pytest.FixtureRequest) -> dict[str, Any]:
    """What happened in tier `request.param`."""
    if os.geteuid() != 0:
        pytest.skip("only root can make itself another kind of host")
    done = other_host.run(HOSTS[request.param], PROGRAM)
    assert done.returncode == 0, done.stderr
    result = dict(json.loads(done.stdout.splitlines()[-1]))
    assert result["tier"] == request.param
    return result


def test_executions_are_the_same_in_every_tier(seen: dict[str, Any]) -> None:
    tier = seen["tier"]
    assert seen["state"] == seen["after"] == ["ok", "1\n", True, tier]
    assert seen["timeout"] == ["timeout", "", True, tier] and seen["cpu"] == ["cpu_limit", "", True, tier]
    assert seen["memory"] == ["memory_limit", "", True, tier] and seen["output"][0] == "output_limit"
    assert seen["files"] == ["data", 1] and seen["died"] == 3 and seen["many"]


def test_nothing_is_left(seen: dict[str, Any]) -> None:
    assert (seen["leaked"], seen["restarts"], seen["open"]) == (0, 0, 0) and seen["folders"]


def test_a_later_run_sees_nothing_of_a_live_session(seen: dict[str, Any]) -> None:
    """In `self` too, where both are the same user: a ruleset that all children share would let each into the folders of
    all before it, and grow for ever."""
    refused = "FileNotFoundError" if seen["tier"] == "ns" else "PermissionError"
    assert seen["later"] == f"{refused} secret"


def test_forks_work_or_are_refused_by_name(seen: dict[str, Any]) -> None:
    assert seen["capabilities"] == (seen["tier"] != "self")
    if seen["tier"] == "self":
        assert seen["fork"] == seen["snapshot"] == "fork_unsupported"
        return
    assert "WORKED" not in seen["attacks"] and seen["attacks"].count("\n") == 9, seen["attacks"]
    assert seen["unharmed"] == "1 secret data\n" and len(set(seen["draws"])) == 2
    assert seen["aborted"] == ["signal", 6, True, False]
    assert seen["restored"] == seen["new"] == seen["orphan"] == "1\n"
    assert seen["strangers"] == "made\n"
