"""Training a reward model: `retool sft` with `sft.head: pairwise | pointwise`.

Right and wrong solutions come from JSONL, one object a line,

    {"chosen": TRACE, "rejected": TRACE}        a pair
    {"trace": TRACE, "label": 1}                1 = right, 0 = wrong; pairs are made of the same problem's

with TRACE as in `retool data generate`, or from the rollout log of a run (`sft.data: runs/mine`): answers that the
verifier called right against those it called wrong, within each group.

What comes out is a folder that `objective.critic: {kind: reward_model, path: ...}` loads.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data_gen import Trace, trace_to_transcript
from data_gen.trace import DataError
from retool.config import Recipe
from retool.errors import UserError
from retool.learner import Learner
from retool.objectives.keyed import key_of
from retool.objectives.phases import RewardHead, reward_accuracy, reward_model
from retool.protocols.codec import Codec
from retool.records import TrainSample
from retool.rollout.log import RolloutLog
from retool.run_folder import ROLLOUTS
from retool.transcript import Sample, Transcript


@dataclass(frozen=True)
class Labelled:
    """One solution, of the problem (or pair) `group`."""

    group: str
    right: bool
    transcript: Transcript


@dataclass(frozen=True)
class RewardData:
    """Atoms (pairs, or single samples) to train on and to judge with; no group is on both sides."""

    train: list[list[TrainSample]]
    held_out: list[TrainSample]


def reward_data(recipe: Recipe, codec: Codec) -> RewardData:
    """The data of the `sft` section. Raises `UserError` when there is none to learn from or to hold out."""
    assert recipe.sft is not None and recipe.sft.head != "language"
    source = Path(recipe.sft.data or recipe.out)
    rows = list(_from_run(source) if (source / ROLLOUTS).is_dir() else _from_jsonl(source, codec))
    groups: dict[str, list[Labelled]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(row)
    atoms = {g: made for g, members in groups.items() if (made := _atoms(g, members, recipe.sft.head))}
    order = sorted(atoms, key=lambda g: key_of("reward-model", recipe.seed, g))
    count = max(1, round(recipe.sft.held_out * len(order)))
    if len(order) - count < 1:
        what = "problems with a right and a wrong answer" if recipe.sft.head == "pairwise" else "problems"
        raise UserError(f"{source} holds {len(order)} {what}: too few to train on some and judge with others")
    held_out = [atom for g in order[:count] for atom in atoms[g]]
    return RewardData([atom for g in order[count:] for atom in atoms[g]], batch_of(held_out, range(len(held_out))))


def batch_of(atoms: Sequence[Sequence[TrainSample]], picks: Iterable[int]) -> list[TrainSample]:
    """The samples of the picked atoms, with ids and pair numbers that are unique in the batch."""
    return [
        replace(sample, id=f"{number}/{sample.id}", pair=number if sample.pair >= 0 else -1)
        for number, index in enumerate(picks)
        for sample in atoms[index]
    ]


def reward_learner(recipe: Recipe, model: Any, tokenizer: Any) -> Learner:
    """A learner whose only network is `model`'s backbone with a scalar head."""
    assert recipe.sft is not None and recipe.sft.head != "language"
    return Learner.of_value_model(recipe, reward_model(recipe.sft.head), model, tokenizer)


def held_out_accuracy(learner: Learner, samples: list[TrainSample], head: RewardHead) -> float:
    """Share of held-out pairs (or samples) that the reward model gets right."""
    batch, _ = learner.measure(samples, frozenset({"bootstrap"}))
    return reward_accuracy(batch["bootstrap"], batch, head)


def _from_run(folder: Path) -> Iterator[Labelled]:
    with RolloutLog(folder / ROLLOUTS, read_only=True) as log:
        for group in log:
            for t in group.usable:
                if t.reward is not None and t.reward.accuracy is not None and t.transcript.n_action:
                    yield Labelled(group.id, t.reward.accuracy > 0.5, t.transcript)


def _from_jsonl(path: Path, codec: Codec) -> Iterator[Labelled]:
    if not path.is_file():
        raise DataError(
            f"there is neither a JSONL of labelled traces nor a run with rollouts at {path}; set sft.data to one"
        )
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield from _from_row(json.loads(line), number, codec)
                except (json.JSONDecodeError, DataError, KeyError, TypeError, ValueError) as error:
                    raise DataError(f"{path}, line {number}: {type(error).__name__}: {error}") from error


def _from_row(row: Mapping[str, Any], number: int, codec: Codec) -> Iterator[Labelled]:
    if "trace" in row:
        if row["label"] not in (0, 1):
            raise DataError(f"label must be 0 or 1, not {row['label']!r}")
        trace = Trace.from_row(row["trace"])
        yield Labelled(trace.problem.id, bool(row["label"]), trace_to_transcript(trace, codec))
        return
    if set(row) != {"chosen", "rejected"}:
        raise DataError("a row has either `trace` and `label`, or `chosen` and `rejected`")
    for name in ("chosen", "rejected"):
        yield Labelled(f"line {number}", name == "chosen", trace_to_transcript(Trace.from_row(row[name]), codec))


def _atoms(group: str, members: Sequence[Labelled], head: RewardHead) -> list[list[TrainSample]]:
    """Pairs of a right and a wrong solution, each used once; or every solution by itself."""
    made = [
        TrainSample(f"{group}.{i}", group, Sample.whole(m.transcript), float(m.right), float(m.right))
        for i, m in enumerate(members)
    ]
    if head == "pointwise":
        return [[sample] for sample in made]
    right, wrong = ([s for s in made if s.score == want] for want in (1.0, 0.0))
    return [[replace(a, pair=0), replace(b, pair=0)] for a, b in zip(right, wrong)]
