"""Problems from files and hub data sets: what is read, and one clear error for everything that cannot be."""

from __future__ import annotations

import builtins
import json
import os
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from retool.config import ProblemsConfig
from retool.problems import ProblemError, load_problems

ROWS = [{"question": f"What is {n}+{n}?", "answer": 2 * n, "level": 3, "note": "x" * 900} for n in range(1, 7)]


def shared(*parts: str) -> Path:
    """A file of the data folder beside the repository, or of $RETOOL_DATA; skips without it."""
    root = Path(os.environ.get("RETOOL_DATA", Path(__file__).resolve().parents[2] / ".." / "shared" / "data"))
    path = root.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"needs {'/'.join(parts)} in ../shared/data or $RETOOL_DATA")
    return path


def jsonl(tmp_path: Path, *rows: Any) -> str:
    path = tmp_path / "set.jsonl"
    path.write_text("".join(f"{r if isinstance(r, str) else json.dumps(r)}\n" for r in rows), encoding="utf-8")
    return str(path)


def config(path: str, **keys: Any) -> ProblemsConfig:
    return ProblemsConfig(**{"kind": "jsonl", "path": path, "shuffle": False, **keys})


def test_rows_become_problems(tmp_path: Path) -> None:
    problems = load_problems(config(jsonl(tmp_path, *ROWS)))
    assert [(p.id, p.answer) for p in problems[:2]] == [("set:1", "2"), ("set:2", "4")]
    assert problems[0].prompt == "What is 1+1?"
    assert problems[0].meta == {"level": 3}


def test_parquet_gives_the_same_as_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "set.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    from_parquet = load_problems(config(str(path), kind="parquet"))
    from_jsonl = load_problems(config(jsonl(tmp_path, *ROWS)))
    assert [(p.id, p.prompt, p.answer, p.meta) for p in from_parquet] == [
        (p.id, p.prompt, p.answer, p.meta) for p in from_jsonl
    ]


def test_shuffle_is_by_seed_and_before_the_limit(tmp_path: Path) -> None:
    path = jsonl(tmp_path, *ROWS)
    all_ids = [p.id for p in load_problems(config(path))]
    mixed = [p.id for p in load_problems(config(path, shuffle=True, seed=1))]
    assert sorted(mixed) == all_ids
    assert mixed != all_ids
    assert [p.id for p in load_problems(config(path, shuffle=True, seed=1, count=2))] == mixed[:2]
    assert len(load_problems(config(path, count=100))) == 6


def test_the_answer_inside_a_solution(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"question": "q", "answer": "2+2=<<2+2=4>>4\n#### 4"})
    (problem,) = load_problems(config(path, answer_pattern=r"####\s*(.+)"))
    assert problem.answer == "4"
    assert problem.meta["teacher"]["solution"].startswith("2+2")


GOOD = {"question": "q", "answer": "1"}


@pytest.mark.parametrize(
    ("rows", "keys", "message"),
    [
        ([], {}, "no problems in it"),
        (["\n", "  "], {}, "no problems in it"),
        ([GOOD, "{broken"], {}, r"set\.jsonl, line 2: not JSON"),
        ([GOOD, "[1]"], {}, "line 2: a list, not an object"),
        ([GOOD, {"question": "q"}], {}, "line 2: no field 'answer'"),
        ([{"questions": "q", "answer": "1"}], {}, "did you mean 'questions'"),
        ([{}], {}, "it has no fields"),
        ([{"question": "q", "answer": None}], {}, "field 'answer' is empty, not text"),
        ([{"question": "q", "answer": " "}], {}, "field 'answer' is empty; correct"),
        ([{"question": "", "answer": "1"}], {}, "field 'question' is empty"),
        ([{"question": ["q"], "answer": "1"}], {}, "a list, not text"),
        ([{"question": "q", "answer": True}], {}, "a bool, not text"),
        ([GOOD], {"answer_pattern": "####(.+)"}, "line 1: .*finds no answer in '1'"),
        ([GOOD], {"answer_pattern": "("}, "no regular expression"),
        ([GOOD], {"answer_pattern": "1"}, "has no group"),
        ([GOOD], {"prompt_field": "problem"}, r"no field 'problem' \(problems\.prompt_field\)"),
    ],
)
def test_unusable_sets_are_refused_with_place_and_reason(
    tmp_path: Path, rows: list[Any], keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ProblemError, match=message):
        load_problems(config(jsonl(tmp_path, *rows), **keys))


def test_bad_rows_can_be_left_out_and_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = jsonl(tmp_path, GOOD, {"question": "q", "answer": None}, {"question": "q", "answer": "2"})
    assert [p.id for p in load_problems(config(path, skip_bad=True))] == ["set:1", "set:3"]
    assert "left out 1 of 3 rows" in caplog.text
    with pytest.raises(ProblemError, match="no field"):  # a wrong field name is a mistake, not a bad row
        load_problems(config(path, skip_bad=True, answer_field="result"))
    with pytest.raises(ProblemError, match="no problems in it"):
        load_problems(config(jsonl(tmp_path, {"question": "q", "answer": None}), skip_bad=True))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(ProblemError, match=r"there is no file nowhere\.jsonl"):
        load_problems(config("nowhere.jsonl"))
    with pytest.raises(ProblemError, match=r"problems\.path is missing"):
        load_problems(ProblemsConfig(kind="jsonl"))
    with pytest.raises(ProblemError, match="not a readable parquet file"):
        load_problems(config(jsonl(tmp_path, GOOD), kind="parquet"))
    binary = tmp_path / "binary.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ProblemError, match="not UTF-8"):
        load_problems(config(str(binary)))


def test_a_hub_set_is_read_through_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A local folder is a data set name too: the real library reads it, without network."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "hubset"
    folder.mkdir()
    pq.write_table(pa.Table.from_pylist([{"question": "2+2", "answer": "4"}]), folder / "train.parquet")
    (problem,) = load_problems(config(str(folder), kind="hf"))
    assert (problem.prompt, problem.answer) == ("2+2", "4")
    with pytest.raises(ProblemError, match=r"hub data set .*split 'test'.*check name"):
        load_problems(config(str(folder), kind="hf", split="test"))


def test_without_the_datasets_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def no_datasets(name: str, *args: Any, **keys: Any) -> Any:
        if name == "datasets":
            raise ImportError(name)
        return real(name, *args, **keys)

    monkeypatch.setattr(builtins, "__import__", no_datasets)
    with pytest.raises(ProblemError, match=r"pip install 'retool-rl\[data\]'"):
        load_problems(config("org/name", kind="hf"))


@pytest.mark.parametrize(
    ("file", "keys", "rows"),
    [
        (("gsm8k", "test.jsonl"), {"answer_pattern": r"####\s*(.+)"}, 1319),
        (("math", "train.jsonl"), {"prompt_field": "problem", "skip_bad": True}, 7470),
        (("math500", "test.jsonl"), {"prompt_field": "problem"}, 500),
        (("aime", "aime24.jsonl"), {"prompt_field": "input", "answer_field": "output"}, 30),
    ],
)
def test_real_sets(file: tuple[str, str], keys: dict[str, Any], rows: int) -> None:
    problems = load_problems(config(str(shared(*file)), **keys))
    assert len(problems) == len({p.id for p in problems}) == rows
    assert all(p.answer and p.prompt for p in problems)
