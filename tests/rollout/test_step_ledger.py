"""learner.jsonl: planned before, finished after, readable whenever its writer died."""

from __future__ import annotations

from pathlib import Path

import pytest

from retool.rollout.step_ledger import StepLedger, StepLedgerError, StepRecord, read_steps


def filled(path: Path) -> StepLedger:
    ledger = StepLedger(path)
    for step in range(4):
        ledger.plan(step, [f"{step}.0.0", f"{step}.0.1"])
        ledger.finish(step, {"loss": step / 2})
    return ledger


def test_steps_and_their_samples(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "run" / "learner.jsonl")
    ledger.plan(4, [["4.0.0"], ["4.0.1"]])
    assert ledger.read()[1] == StepRecord(1, ["1.0.0", "1.0.1"], {"loss": 0.5})
    assert ledger.read()[-1] == StepRecord(4, [["4.0.0"], ["4.0.1"]], None)
    with pytest.raises(StepLedgerError, match="step 4 was planned before"):
        StepLedger(ledger.path).plan(4, [])
    with pytest.raises(StepLedgerError, match="step 3 ends, but 4 was planned"):
        ledger.finish(3, {})


def test_truncating_and_going_on(tmp_path: Path) -> None:
    ledger = filled(tmp_path / "learner.jsonl")
    ledger.truncate_after(1)
    assert [r.step for r in ledger.read()] == [0, 1]
    ledger.plan(2, ["again"])
    assert [r.samples for r in ledger.read()][-1] == ["again"]
    ledger.truncate_after(-1)
    assert ledger.read() == [] and ledger.path.read_bytes() == b""


def test_a_torn_last_line_is_harmless_wherever_it_is_torn(tmp_path: Path) -> None:
    path = tmp_path / "learner.jsonl"
    whole = filled(path).path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        steps = read_steps(path)
        assert [r.step for r in steps] == list(range(len(steps)))
        assert path.stat().st_size == cut  # reading changes nothing
        ledger = StepLedger(path)
        ledger.plan(9, ["x"])
        assert [r.step for r in ledger.read()] == [*range(len(steps)), 9]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "learner.jsonl"
    lines = filled(path).path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:2], "{broken\n", *lines[3:]]))
    with pytest.raises(StepLedgerError, match="line 3 is broken"):
        read_steps(path)
    path.write_text("".join(lines[1:]))
    with pytest.raises(StepLedgerError, match="line 1: step 0 ends without having begun"):
        read_steps(path)
