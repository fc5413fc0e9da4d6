"""A user's mistakes: one clear line with the fix, exit code 2, no traceback, nothing half-written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from retool.models import tiny_tokenizer
from tests.system.runs import retool

TINY = "recipes/tiny.yaml"


def fails(*args: str, fresh: bool = False) -> str:
    done = retool(*args, fresh=fresh)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    return done.stderr


def test_unknown_key(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "did you mean 'learner.lr'" in fails("train", TINY, f"out={out}", "learner.lrr=1")
    assert not out.exists()


def test_missing_recipe() -> None:
    assert "did you mean recipes/tiny.yaml" in fails("train", "recipes/tinny.yaml", fresh=True)


def test_missing_problem_file(tmp_path: Path) -> None:
    out = tmp_path / "run"
    error = fails("train", TINY, f"out={out}", "problems={kind: jsonl, path: nowhere.jsonl}")
    assert "nowhere.jsonl" in error
    assert not out.exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no problem"),
        ([{"question": "1+1?", "answer": "2"}, {"question": "1+2?"}], "answer"),
        ([{"question": "1+1?", "answer": ""}], "answer"),
    ],
    ids=["empty", "no answer field", "blank answer"],
)
def test_bad_problem_rows(tmp_path: Path, rows: list[dict], message: str) -> None:
    file, out = tmp_path / "rows.jsonl", tmp_path / "run"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    error = fails("train", TINY, f"out={out}", f"problems={{kind: jsonl, path: {file}}}")
    assert message in error and "rows.jsonl" in error
    assert not out.exists()


def test_model_without_chat_template(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"model_type": "llama"}')
    out = tmp_path / "run"
    assert "chat_template" in fails("train", TINY, f"out={out}", f"model={{path: {tmp_path / 'm'}}}")
    assert not out.exists()


def test_missing_model(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "no model folder" in fails("train", TINY, f"out={out}", "model={path: ./nowhere}")
    assert not out.exists()


def test_unwritable_run_folder(tmp_path: Path) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("")
    assert "cannot write to the folder" in fails("train", TINY, f"out={blocker}/run")


def test_impossible_combination(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert "rollout.group_size must be >= 2" in fails("train", TINY, f"out={out}", "rollout.group_size=1")
    assert not out.exists()


def test_unknown_explain_key_and_preset() -> None:
    assert "did you mean 'rollout.group_size'" in fails("explain", "rollout.groupsize")
    assert "grpo" in fails("train", TINY, "objective=grop", "--dry-run")


def test_eval_needs_problems(tmp_path: Path) -> None:
    assert "give a recipe" in fails("eval", "-", str(tmp_path))
    assert "missing.jsonl" in fails("eval", "-", str(tmp_path / "missing.jsonl"), "--recipe", TINY)


def test_view_needs_a_run(tmp_path: Path) -> None:
    assert "not the folder of an RL run" in fails("view", str(tmp_path))
