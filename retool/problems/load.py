"""`load_problems`: a list of problems from a recipe's `problems` section, or one clear error."""

from __future__ import annotations

import difflib
import logging
import random
from collections import Counter
from hashlib import blake2b
from typing import Any

from retool.config import ProblemsConfig
from retool.problems.families import FAMILIES, Family, Item
from retool.problems.rows import BadRow, ProblemError, read_rows, to_problem
from retool.records import Problem

_log = logging.getLogger(__name__)

TEST_SHARE = 0.1  # of all prompts of a procedural family are held out, by the prompt's hash
_MAX_MISSES = 2000  # draws without a new prompt after which a family counts as exhausted

__all__ = ["ProblemError", "load_problems"]


def load_problems(config: ProblemsConfig) -> list[Problem]:
    """Problems in a reproducible order, with unique ids that do not depend on that order.

    Raises `ProblemError` (a missing file, an empty set, a row without an answer, ...) saying where and what to do.
    """
    if config.kind == "procedural":
        return _procedural(config)
    problems = _from_rows(config)
    if not problems:
        raise ProblemError(f"{config.path}: no problems in it; give a data set with at least one row")
    repeated = [i for i, n in Counter(p.id for p in problems).items() if n > 1]
    if repeated:
        raise ProblemError(f"{config.path}: the id {repeated[0]!r} occurs more than once; ids must be unique")
    if config.shuffle:
        random.Random(f"shuffle:{config.seed}").shuffle(problems)
    return problems[: config.count]


def _from_rows(config: ProblemsConfig) -> list[Problem]:
    problems: list[Problem] = []
    bad: list[BadRow] = []
    for where, row, identity in read_rows(config):
        try:
            problems.append(to_problem(config, where, row, identity))
        except BadRow as error:
            if not config.skip_bad:
                raise
            bad.append(error)
    if bad:
        _log.warning(
            "%s: left out %d of %d rows; the first: %s", config.path, len(bad), len(bad) + len(problems), bad[0]
        )
    return problems


def split_of(prompt: str) -> str:
    """`train` or `test`: the same for every seed, so that sets of different splits never share a prompt."""
    return "test" if int.from_bytes(_hash(prompt)[:4], "big") < TEST_SHARE * 2**32 else "train"


def _hash(prompt: str) -> bytes:
    return blake2b(prompt.encode(), digest_size=8).digest()


def _procedural(config: ProblemsConfig) -> list[Problem]:
    """The families take turns; a set holds every prompt once."""
    if not config.families:
        raise ProblemError(f"problems.families is empty; name at least one of {', '.join(sorted(FAMILIES))}")
    if config.count is None:
        raise ProblemError("problems.count is missing; procedural problems need to know how many, e.g. count: 1000")
    if config.split not in ("train", "test"):
        raise ProblemError(f"problems.split is {config.split!r}; procedural problems have the splits train and test")
    families = [_family(name) for name in config.families]
    if len(set(config.families)) < len(families):
        raise ProblemError(f"problems.families names a family twice: {', '.join(config.families)}")
    draws = {f.name: random.Random(f"{config.seed}:{f.name}") for f in families}
    seen: set[str] = set()
    problems: list[Problem] = []
    for index in range(config.count):
        family = families[index % len(families)]
        item = _fresh(family, draws[family.name], config.split, seen, index // len(families))
        problems.append(_problem(family, item))
    if config.shuffle:
        random.Random(f"shuffle:{config.seed}").shuffle(problems)
    return problems


def _family(name: str) -> Family:
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(sorted(FAMILIES))}"
        raise ProblemError(f"problems.families: there is no family {name!r}; {hint}")
    return FAMILIES[name]


def _fresh(family: Family, rng: random.Random, split: str, seen: set[str], have: int) -> Item:
    for _ in range(_MAX_MISSES):
        item = family.make(rng)
        if item.prompt not in seen and split_of(item.prompt) == split:
            seen.add(item.prompt)
            return item
    raise ProblemError(
        f"problem family {family.name!r} has hardly more than {have} different prompts in split {split!r}; "
        "lower problems.count or add a family"
    )


def _problem(family: Family, item: Item) -> Problem:
    """`meta["teacher"]` is what the programmatic teacher writes from; it is never shown to the policy."""
    return Problem(
        id=f"{family.name}:{_hash(item.prompt).hex()}",
        prompt=item.prompt,
        answer=item.answer,
        source="procedural",
        family=family.name,
        meta=_teacher_meta(item),
    )


def _teacher_meta(item: Item) -> dict[str, Any]:
    return {"teacher": {"code": item.code, "steps": list(item.steps)}}
