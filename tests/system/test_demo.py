"""The demo's machinery on a very small budget: files, schema, guarantees. benchmarks/demo_seeds shows that it
teaches."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.system.runs import retool

SMALL = (
    "steps=2",
    "checkpoint_every=2",
    "model={tiny: {hidden: 32, layers: 2, heads: 2, intermediate: 64, context: 192}}",
    "data.problems.count=60",
    "sft.steps=5",
    "sft.batch_size=16",
    "eval.problems.count=9",
    "rollout.prompts=2",
    "rollout.group_size=4",
)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished small demo, in a folder with a space in its name."""
    out = tmp_path_factory.mktemp("a demo") / "run"
    done = retool("demo", *SMALL, f"out={out}")
    assert done.returncode == 0, done.stderr
    assert "held-out problems" in done.stdout
    return out


def test_summary_has_the_promised_shape(demo: Path) -> None:
    summary = json.loads((demo / "summary.json").read_text())
    assert set(summary) == {"stages", "seconds", "rollout"}
    assert set(summary["stages"]) == {"base", "sft", "rl"}
    for stage in summary["stages"].values():
        assert set(stage["by_family"]) == {"product", "square_plus", "last"}
        for part in (stage, *stage["by_family"].values()):
            for arm in ("tool", "no_tool"):
                figures = part[arm]
                low, high = figures["ci95"]
                assert 0 <= low <= figures["accuracy"] <= high <= 1
                assert figures["n"] > 0
                assert 0 <= figures["code_ratio"] <= 1
            assert part["no_tool"]["code_ratio"] == 0
    assert summary["rollout"]["trained_equals_sampled"] == 1.0
    assert summary["rollout"]["max_logprob_gap"] <= 1e-4
    assert summary["rollout"]["infra_failures"] == 0
    assert set(summary["seconds"]) == {"data", "sft", "rl", "total"}


def test_report_shows_curves_and_traces_and_runs_nothing(demo: Path) -> None:
    page = (demo / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") >= 4
    assert "<script" not in page
    assert "after RL" in page and "Say what" in page


def test_every_trace_block_was_executed(demo: Path) -> None:
    rows = [json.loads(line) for line in (demo / "traces.jsonl").read_text().splitlines()]
    with_tool = [row for row in rows if row["tool_calls"]]
    assert len(rows) == 60
    assert {row["family"] for row in with_tool} == {"product", "square_plus", "last"}
    for row in with_tool:
        shown = [s["text"].strip() for s in row["segments"] if s["origin"] == "tool"]
        assert shown == [row["problem"]["answer"]]


def test_view_and_eval_work_on_what_it_left(demo: Path) -> None:
    seen = retool("view", str(demo / "rl"))
    assert seen.returncode == 0, seen.stderr
    assert (demo / "rl" / "report.html").exists()
    out = demo / "eval.json"
    flags = ("--limit", "6", "--k", "2", "--out", str(out), "--show", "1")
    done = retool("eval", str(demo / "rl" / "model"), "recipes/demo.yaml", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(out.read_text())
    assert result["figures"]["n"] == 12 and len(result["trajectories"]) == 12
