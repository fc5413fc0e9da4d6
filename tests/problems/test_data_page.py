"""The snippets of docs/data.md do what the page says."""

from __future__ import annotations

import json
import re
from pathlib import Path

import yaml

from data_gen.trace import Trace
from retool.config import ProblemsConfig
from retool.problems import FAMILIES, load_problems

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def test_the_recipes_are_valid_and_the_sets_disjoint() -> None:
    first, second = (yaml.safe_load(b) for b in blocks("yaml"))
    train = load_problems(ProblemsConfig(**first["problems"]))
    test = load_problems(ProblemsConfig(**first["eval"]["problems"]))
    assert (len(train), len(test)) == (6000, 300)
    assert not {p.prompt for p in train} & {p.prompt for p in test}
    assert re.search(ProblemsConfig(**second["problems"]).answer_pattern or "", "so 4\n#### 4")


def test_the_family_of_the_page_works() -> None:
    source = next(b for b in blocks("python") if "@register" in b)
    try:
        exec(source, {})
        problems = load_problems(ProblemsConfig(families=("half",), count=5))
        assert all(int(p.prompt[8:-1]) == 2 * int(p.answer) for p in problems)
    finally:
        FAMILIES.pop("half", None)


def test_the_trace_of_the_page_is_a_trace() -> None:
    (text,) = blocks("json")
    trace = Trace.from_row(json.loads(text))
    assert trace.problem.answer == trace.segments[1].text == str(347 * 892)
