"""`learner.jsonl`: what the learner was about to train on, and what came of it.

One line before an optimiser step names its samples in order, one line after it holds the metrics. With the rollout
log, that makes the learner a replayable function. A killed writer leaves at most one torn last line, which is ignored
by readers and cut by the next writer.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


class StepLedgerError(Exception):
    """A ledger that contradicts itself; the message names the line."""


@dataclass
class StepRecord:
    """`samples`: what was trained on, in order (a list of mini-batches when the learner wrote one). `metrics` is None
    when the step began but did not end. `memory`: what the next step's draw of problems needs to know, if anything."""

    step: int
    samples: list[Any]
    metrics: dict[str, Any] | None = None
    memory: dict[str, Any] | None = None


class StepLedger:
    """The learner's rank 0 owns it. Raises `StepLedgerError` for a step that is planned twice or ends unplanned."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._cut_torn_line()
        self._last = max((r.step for r in self.read()), default=-1)

    def plan(self, step: int, samples: Sequence[Any], memory: Mapping[str, Any] | None = None) -> None:
        """Before the update: on disk when this returns."""
        if step <= self._last:
            raise StepLedgerError(f"{self.path}: step {step} was planned before (last: {self._last}); truncate first")
        row: dict[str, Any] = {"step": step, "samples": list(samples)}
        self._write(row if memory is None else {**row, "memory": dict(memory)})
        self._last = step

    def finish(self, step: int, metrics: Mapping[str, Any]) -> None:
        """After the update."""
        if step != self._last:
            raise StepLedgerError(f"{self.path}: step {step} ends, but {self._last} was planned")
        self._write({"step": step, "metrics": dict(metrics)})

    def read(self) -> list[StepRecord]:
        """All steps in order; a torn last line does not count."""
        return read_steps(self.path)

    def truncate_after(self, step: int) -> None:
        """Keep only steps up to `step`, in one rename. On resume: everything behind the checkpoint happens again."""
        lines = [line for line in _lines(self.path) if json.loads(line)["step"] <= step]
        fresh = self.path.with_name(self.path.name + ".new")
        with fresh.open("w", encoding="utf-8") as out:
            out.writelines(f"{line}\n" for line in lines)
            out.flush()
            os.fsync(out.fileno())
        fresh.replace(self.path)
        self._last = max((r.step for r in self.read()), default=-1)

    def _write(self, row: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as out:
            out.write(json.dumps(row, separators=(",", ":")) + "\n")
            out.flush()
            os.fsync(out.fileno())

    def _cut_torn_line(self) -> None:
        if not self.path.exists():
            return
        data = self.path.read_bytes()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            os.truncate(self.path, whole)


def read_steps(path: Path | str) -> list[StepRecord]:
    """Steps of a ledger, also while it is being written. Raises `StepLedgerError` for a broken line before the last."""
    found: list[StepRecord] = []
    for number, line in enumerate(_lines(Path(path)), start=1):
        try:
            row = json.loads(line)
            if "samples" in row:
                found.append(StepRecord(row["step"], row["samples"], memory=row.get("memory")))
            elif found and found[-1].step == row["step"]:
                found[-1].metrics = row["metrics"]
            else:
                raise StepLedgerError(f"{path}, line {number}: step {row['step']} ends without having begun")
        except (ValueError, KeyError, TypeError) as error:
            raise StepLedgerError(f"{path}, line {number} is broken ({error}); restore the file") from error
    return found


def _lines(path: Path) -> list[str]:
    """Whole lines."""
    if not path.exists():
        return []
    return path.read_bytes().decode("utf-8", "replace").split("\n")[:-1]
