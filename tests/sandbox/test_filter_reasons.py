"""Every allowed system call has one reason, and nothing has a reason that is not allowed."""

from __future__ import annotations

from collections import Counter

from sandbox.linux.numbers import ALLOWED, SPECIAL
from sandbox.linux.reasons import REASONS
from sandbox.linux.seccomp import _CHANGE_CALLS, _FORK_CALLS, _argument_rules


def test_reasons_and_numbers_agree() -> None:
    explained = Counter(name for names in REASONS.values() for name in names.split())
    assert [name for name, count in explained.items() if count > 1] == []
    assert set(explained) == set(ALLOWED["x86_64"]) | set(ALLOWED["aarch64"])


def test_what_is_judged_is_not_also_simply_allowed() -> None:
    for machine, special in SPECIAL.items():
        assert set(special) == set(_argument_rules(2, False, True))
        assert not set(special) & set(ALLOWED[machine])
        assert not set(special.values()) & set(ALLOWED[machine].values())
    metadata = next(names for reason, names in REASONS.items() if reason.startswith("metadata")).split()
    assert set(metadata) == set(_CHANGE_CALLS) and set(_FORK_CALLS) <= set(ALLOWED["x86_64"])
