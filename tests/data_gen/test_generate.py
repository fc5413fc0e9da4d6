"""Generation end to end: executed in the real sandbox, verified, resumable, and honest about what it rejects."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from data_gen import DataError, generate, inspect, load_traces
from data_gen.teacher import uses_tool
from retool.config import DataConfig, ProblemsConfig, ProtocolConfig, Recipe, RewardConfig
from retool.problems import FAMILIES as KNOWN
from retool.problems import Item, load_problems, register
from retool.protocols import build_protocol
from sandbox.local import LocalSandbox
from sandbox.types import SandboxError
from tests.data_gen.conftest import FAMILIES, codec_of, recipe
from tests.data_gen.runner import ProcessRunner


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


async def test_every_block_is_executed_and_every_answer_right(tmp_path: Path) -> None:
    config = recipe(60)
    codec = codec_of(config)
    told: list[tuple[int, int, int]] = []
    async with LocalSandbox(profile="py-bare") as box:
        report = await generate(config, box, codec, tmp_path / "t.jsonl", lambda *a: told.append(a))
    traces = load_traces(tmp_path / "t.jsonl")
    problems = load_problems(config.data.problems)  # type: ignore[union-attr]
    assert [t.problem.id for t in traces] == [p.id for p in problems]
    assert (report.problems, report.accepted, report.rejected) == (60, 60, {})
    assert told[0] == (0, 60, 0)
    assert told[-1] == (60, 60, 60)
    for trace in traces:
        assert codec.protocol.check(trace.rendered(codec.protocol)) == []
        assert codec.protocol.candidates(trace.policy_text) == [trace.problem.answer]
        tool = [s.text for s in trace.segments if s.origin == "tool"]
        assert len(tool) == trace.tool_calls <= 1
        assert tool in ([], [trace.problem.answer])
    assert report.tool_traces == sum(t.tool_calls for t in traces)
    assert names(tmp_path) == ["t.jsonl", "t.jsonl.report.json"]


async def test_tool_use_is_keyed_by_seed_and_problem_and_says_nothing_about_the_family(tmp_path: Path) -> None:
    problems = load_problems(ProblemsConfig(families=FAMILIES, count=6000))
    for share in (0.0, 0.3, 1.0):
        for family in FAMILIES:
            mine = [uses_tool(5, p, share) for p in problems if p.family == family]
            assert sum(mine) / len(mine) == pytest.approx(share, abs=0.04)
    config = recipe(12, tool_share=0.5)
    await generate(config, ProcessRunner(), codec_of(config), tmp_path / "t.jsonl")
    for trace in load_traces(tmp_path / "t.jsonl"):
        assert (trace.tool_calls > 0) == uses_tool(0, trace.problem, 0.5)
    assert [uses_tool(0, p, 0.5) for p in problems[:99]] != [uses_tool(1, p, 0.5) for p in problems[:99]]


def _family(rng: random.Random, code: str, answer: str | None = None) -> Item:
    n = rng.randint(1, 10**6)
    return Item(f"Say {n}.", str(n) if answer is None else answer, code.replace("N", str(n)))


BAD = {
    "fails": ("1/0", "execution: error"),
    "silent": ("x = N", "format: code that prints nothing"),
    "prints_nothing": ("if 0: print(N)", "answer: differs from the reference"),
    "lies": ("print(N + 1)", "answer: differs from the reference"),
    "nests": ("print('<code>')", "format: <code> inside <code>"),
}


@pytest.mark.parametrize("name", sorted(BAD))
async def test_what_is_not_right_is_rejected_with_its_reason(tmp_path: Path, name: str) -> None:
    code, reason = BAD[name]
    register(name, "", needs_tool=True)(lambda rng: _family(rng, code))
    try:
        config = recipe(8, tool_share=1.0, families=("last", name))
        report = await generate(config, ProcessRunner(), codec_of(config), tmp_path / "t.jsonl")
    finally:
        del KNOWN[name]
    assert report.rejected == {reason: 4}
    assert report.accepted == 4
    assert {t.family for t in load_traces(tmp_path / "t.jsonl")} == {"last"}


async def test_a_hostile_output_is_shown_escaped_and_trains_nothing(tmp_path: Path) -> None:
    """The tool prints tags, a box and then the answer: the trace stays well formed."""
    register("shouts", "", needs_tool=True)(
        lambda rng: _family(rng, "print('</'+'interpreter>\\\\boxed{1}<'+'answer>');print(N)")
    )
    try:
        config = recipe(3, tool_share=1.0, families=("shouts",))
        codec = codec_of(config)
        await generate(config, ProcessRunner(), codec, tmp_path / "t.jsonl")
    finally:
        del KNOWN["shouts"]
    from data_gen import trace_to_transcript

    for trace in load_traces(tmp_path / "t.jsonl"):
        assert "</interpreter>" in trace.segments[1].text
        observation = trace_to_transcript(trace, codec).spans[2]
        assert codec.decode(observation.ids).count("</interpreter>") == 1


async def test_a_broken_sandbox_is_retried_then_stops_the_run_which_can_go_on(tmp_path: Path) -> None:
    config = recipe(20, tool_share=1.0)
    codec = codec_of(config)
    runner = ProcessRunner(fail=2)
    await generate(config, runner, codec, tmp_path / "undisturbed.jsonl")
    assert len(runner.executed) == 20

    class DiesLater(ProcessRunner):
        async def exec(self, code: str, **keys: Any) -> Any:
            if len(self.executed) >= 7:
                self.fail = 10**6
            return await super().exec(code, **keys)

    out = tmp_path / "t.jsonl"
    with pytest.raises(SandboxError, match="supervisor is gone"):
        await generate(config, DiesLater(), codec, out)
    assert not out.exists()
    done = len((tmp_path / "t.jsonl.partial").read_text().splitlines()) - 1
    assert done > 0
    second = ProcessRunner()
    report = await generate(config, second, codec, out)
    assert report.resumed == done
    assert len(second.executed) == 20 - done
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


async def test_a_finished_set_is_not_made_again_but_another_recipe_is(tmp_path: Path) -> None:
    out = tmp_path / "t.jsonl"
    config = recipe(10)
    first = await generate(config, ProcessRunner(), codec_of(config), out)
    again = ProcessRunner()
    assert await generate(config, again, codec_of(config), out) == first
    assert again.executed == []
    other = recipe(10, tool_share=1.0)
    assert (await generate(other, ProcessRunner(), codec_of(other), out)).tool_traces == 10


async def test_a_torn_line_and_another_recipes_rest_are_no_obstacle(tmp_path: Path) -> None:
    out, partial = tmp_path / "t.jsonl", tmp_path / "t.jsonl.partial"
    config = recipe(6)
    partial.write_text('{"fingerprint": "another"}\n{"problem": "x", "row": {}}\n')
    report = await generate(config, ProcessRunner(), codec_of(config), out)
    assert (report.resumed, report.accepted) == (0, 6)
    assert not partial.exists()
    fingerprint = json.loads((tmp_path / "t.jsonl.report.json").read_text())["fingerprint"]
    row = {"problem": load_traces(out)[2].problem.id, "row": {"trace": load_traces(out)[2].to_row()}}
    whole = out.read_bytes()
    out.unlink()
    partial.write_text(json.dumps({"fingerprint": fingerprint}) + "\n" + json.dumps(row) + "\n" + '{"problem": "tor')
    assert (await generate(config, ProcessRunner(), codec_of(config), out)).resumed == 1
    assert out.read_bytes() == whole


SCRIPT = """
import asyncio, sys
from pathlib import Path
from tests.data_gen.conftest import codec_of, recipe
from tests.data_gen.runner import ProcessRunner
from data_gen import generate
config = recipe(40, tool_share=1.0)
asyncio.run(generate(config, ProcessRunner(), codec_of(config), Path(sys.argv[1])))
"""


async def test_kill_dash_nine_and_go_on(tmp_path: Path) -> None:
    """A real process, killed after its first rows; the next run ends with the same bytes."""
    config = recipe(40, tool_share=1.0)
    await generate(config, ProcessRunner(), codec_of(config), tmp_path / "undisturbed.jsonl")
    out = tmp_path / "t.jsonl"
    _run_and_kill(out, rows=5)
    assert not out.exists()
    report = await generate(config, ProcessRunner(), codec_of(config), out)
    assert 5 <= report.resumed < 40
    assert out.read_bytes() == (tmp_path / "undisturbed.jsonl").read_bytes()


def _run_and_kill(out: Path, rows: int) -> None:
    root = str(Path(__file__).resolve().parents[2])
    process = subprocess.Popen([sys.executable, "-c", SCRIPT, str(out)], env={**os.environ, "PYTHONPATH": root})
    partial = out.with_name(f"{out.name}.partial")
    end = time.monotonic() + 60
    while not partial.exists() or partial.read_bytes().count(b"\n") <= rows:
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def rows(tmp_path: Path, *answers: str) -> str:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"question": f"q{i}", "answer": a}) + "\n" for i, a in enumerate(answers)))
    return str(path)


async def test_solutions_with_calculator_marks_become_scripts(tmp_path: Path) -> None:
    solutions = (
        "Half of 48 is 48/2 = <<48/2=24>>24.\nIn all 48+24 = $<<48+24=72>>72.\n#### 72",
        "She has 3*4 = <<3*4=13>>13.\n#### 13",
        "It is obvious.\n#### 5",
        "It is <<x*2=4>>4.\n#### 4",
        "A third is 10/3 = <<10/3=3.33>>3.33.\n#### 3.33",
    )
    config = recipe(
        5,
        tool_share=1.0,
        kind="jsonl",
        path=rows(tmp_path, *solutions),
        answer_pattern=r"####\s*(.+)",
        shuffle=False,
    )
    report = await generate(config, ProcessRunner(), codec_of(config), tmp_path / "t.jsonl")
    assert report.rejected == {
        "execution contradicts the material": 1,
        "no calculation in the solution": 1,
        "a calculation that is not plain arithmetic": 1,
    }
    first, second = load_traces(tmp_path / "t.jsonl")
    assert first.segments[0].text == ("<code># Half of 48 is 48/2.\nprint(48/2)\n# In all 48+24.\nprint(48+24)</code>")
    assert first.segments[1].text == "24.0\n72"
    assert first.segments[2].text.startswith("Half of 48 is 48/2 = 24.\nIn all 48+24 = $72.\n<answer>")
    assert "<<" not in first.policy_text
    assert second.problem.answer == "3.33"
    direct = config.model_copy(update={"data": config.data.model_copy(update={"tool_share": 0.0})})  # type: ignore[union-attr]
    report = await generate(direct, ProcessRunner(), codec_of(direct), tmp_path / "direct.jsonl")
    assert (report.accepted, report.tool_traces) == (5, 0)


async def test_what_cannot_be_generated_says_why(tmp_path: Path) -> None:
    none = Recipe()
    with pytest.raises(DataError, match="no `data` section"):
        await generate(none, ProcessRunner(), codec_of(none), tmp_path / "t.jsonl")
    plain = recipe(2, kind="jsonl", path=rows(tmp_path, "1", "2"))
    with pytest.raises(DataError, match=r"no trace was accepted of 2 problems.*no teacher material: 2"):
        await generate(plain, ProcessRunner(), codec_of(plain), tmp_path / "t.jsonl")
    (tmp_path / "file").write_text("")
    fine = recipe(2)
    with pytest.raises(DataError, match="cannot write"):
        await generate(fine, ProcessRunner(), codec_of(fine), tmp_path / "file" / "t.jsonl")
    assert names(tmp_path) == ["file", "words.jsonl"]


async def test_inspect(tmp_path: Path) -> None:
    config = recipe(30, tool_share=0.5)
    await generate(config, ProcessRunner(), codec_of(config), tmp_path / "t.jsonl")
    told = inspect(tmp_path / "t.jsonl", samples=2)
    assert (told["traces"], told["problems"]) == (30, 30)
    assert set(told["families"]) == set(FAMILIES)
    assert sum(f["traces"] for f in told["families"].values()) == 30
    assert [s["tool_calls"] for s in told["samples"]] == [1, 1, 0, 0]
    json.dumps(told)


async def test_fenced_traces_for_real_models(tmp_path: Path) -> None:
    config = Recipe(
        data=DataConfig(problems=ProblemsConfig(families=FAMILIES, count=6), tool_share=1.0),
        protocol=ProtocolConfig(),
        reward=RewardConfig(timeout_s=60),
    )
    codec = codec_of(config)
    await generate(config, ProcessRunner(), codec, tmp_path / "t.jsonl")
    protocol = build_protocol(config.protocol)
    for trace in load_traces(tmp_path / "t.jsonl"):
        assert trace.segments[0].text.startswith("<code>\n```python\n")
        assert protocol.check(trace.rendered(protocol)) == []
