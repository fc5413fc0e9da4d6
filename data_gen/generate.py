"""Generate cold-start traces: plan, execute in the sandbox, verify answer and format, write.

Every code block is really executed and its true output stands in the trace. What fails a check is rejected and counted
by reason. A failure of the sandbox is ours: it is retried and then stops the run, which can be continued: finished
problems are kept in `<out>.partial`, and the file that results is the same as without the interruption.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_gen.partial import Partial
from data_gen.teacher import NoMaterial, plan, uses_tool
from data_gen.trace import DataError, Segment, Trace, write_traces
from retool.config import DataConfig, Recipe
from retool.files import write_text
from retool.problems import load_problems
from retool.protocols import Codec, CodecError
from retool.records import Problem, ToolCall, Trajectory
from retool.rewards import Rewarder
from retool.rollout.observation import render
from retool.transcript import Transcript
from sandbox.types import Limits, Sandbox, SandboxError

Progress = Callable[[int, int, int], None]
_FORMAT = 2  # raise when traces of an older version must not be continued
_RETRY_S = 0.2

__all__ = ["DataError", "Report", "generate"]


@dataclass(frozen=True)
class Report:
    """What a run made. `rejected`: reason → number. `resumed`: problems that an earlier run had finished."""

    path: str
    problems: int
    accepted: int
    tool_traces: int
    rejected: dict[str, int]
    seconds: float
    resumed: int = 0


class _Rejected(Exception):
    """The reason why a problem gave no trace."""


async def generate(
    recipe: Recipe, sandbox: Sandbox, codec: Codec, out: Path, progress: Progress | None = None
) -> Report:
    """Write the traces of `recipe.data` to `out` (JSONL) and a report beside it (`<out>.report.json`).

    `progress(done, total, accepted)` is called after every problem. Raises `DataError` (no data section, nothing
    accepted, unwritable folder), `ProblemError`, and `SandboxError` when the sandbox stays broken after its retries.
    """
    if recipe.data is None:
        raise DataError("the recipe has no `data` section; add one with `problems` to say what to write traces for")
    began = time.monotonic()
    problems = load_problems(recipe.data.problems)
    fingerprint = fingerprint_of(recipe, problems)
    if (finished := _finished(out, fingerprint)) is not None:
        return finished
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial = Partial(out.with_name(f"{out.name}.partial"), fingerprint)
    except OSError as error:
        raise DataError(f"cannot write to {out.parent} ({error.strerror}); choose another run folder") from error
    resumed = len(partial.rows)
    with partial:
        async with Rewarder(recipe.reward, codec.protocol, sandbox) as rewarder:
            writer = _Writer(recipe, recipe.data, sandbox, codec, rewarder, partial, problems, progress)
            await writer.run()
    traces = [Trace.from_row(row["trace"]) for p in problems if "trace" in (row := partial.rows[p.id])]
    rejected = Counter(row["rejected"] for row in partial.rows.values() if "rejected" in row)
    if not traces:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in rejected.most_common())
        partial.remove()
        raise DataError(f"no trace was accepted of {len(problems)} problems ({reasons})")
    report = Report(
        path=str(out),
        problems=len(problems),
        accepted=len(traces),
        tool_traces=sum(t.tool_calls > 0 for t in traces),
        rejected=dict(rejected.most_common()),
        seconds=round(time.monotonic() - began, 3),
        resumed=resumed,
    )
    write_traces(out, traces)
    write_text(_report_path(out), json.dumps({"fingerprint": fingerprint, **asdict(report)}, indent=1) + "\n")
    partial.remove()
    return report


def fingerprint_of(recipe: Recipe, problems: list[Problem]) -> str:
    """Of everything that decides what the traces are."""
    parts: dict[str, Any] = {
        "format": _FORMAT,
        "data": recipe.data.model_dump(mode="json") if recipe.data else None,
        "protocol": recipe.protocol.model_dump(mode="json"),
        "sandbox": recipe.sandbox.model_dump(mode="json", include={"profile", "wall_s", "cpu_s", "memory_mb"}),
        "observation_chars": recipe.rollout.observation_chars,
        "verifier": recipe.reward.verifier,
        "problems": [[p.id, p.prompt, p.answer, p.meta.get("teacher")] for p in problems],
    }
    return hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=16).hexdigest()


def _report_path(out: Path) -> Path:
    return out.with_name(f"{out.name}.report.json")


def _finished(out: Path, fingerprint: str) -> Report | None:
    """The report of an earlier run that made exactly this."""
    try:
        row = json.loads(_report_path(out).read_text(encoding="utf-8"))
        same = row.pop("fingerprint") == fingerprint and out.is_file()
        return Report(**row) if same else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


class _Writer:
    """Works through the problems, several at once; results do not depend on who ends first."""

    def __init__(
        self,
        recipe: Recipe,
        data: DataConfig,
        sandbox: Sandbox,
        codec: Codec,
        rewarder: Rewarder,
        partial: Partial,
        problems: list[Problem],
        progress: Progress | None,
    ) -> None:
        self.recipe, self.data, self.sandbox, self.codec = recipe, data, sandbox, codec
        self.rewarder, self.partial, self.problems, self.progress = rewarder, partial, problems, progress
        box = recipe.sandbox
        self.limits = Limits(wall_s=box.wall_s, cpu_s=box.cpu_s, memory_mb=box.memory_mb)

    async def run(self) -> None:
        todo = iter([p for p in self.problems if p.id not in self.partial.rows])
        self._tell()

        async def work() -> None:
            for problem in todo:
                self.partial.add(problem.id, await self._row(problem))
                self._tell()

        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.recipe.rollout.concurrency, 16)):
                    group.create_task(work())
        except BaseExceptionGroup as failures:
            raise failures.exceptions[0] from None  # the first one stopped the others

    def _tell(self) -> None:
        if self.progress is not None:
            self.progress(len(self.partial.rows), len(self.problems), self.partial.accepted)

    async def _row(self, problem: Problem) -> dict[str, Any]:
        try:
            return {"trace": (await self._trace(problem)).to_row()}
        except (_Rejected, NoMaterial) as rejection:
            return {"rejected": str(rejection)}

    async def _trace(self, problem: Problem) -> Trace:
        tool = uses_tool(self.data.seed, problem, self.data.tool_share)
        idea = plan(problem, tool)
        protocol = self.codec.protocol
        line = "\n" if idea.steps else ""
        steps = "\n".join(idea.steps) + line
        if idea.code is None:
            segments = [Segment("demo", steps + protocol.render_answer(idea.answer("")))]
            calls: list[ToolCall] = []
        else:
            output = await self._execute(problem, idea.code)
            if not idea.accepts(output):
                raise _Rejected("execution contradicts the material")
            turn = protocol.render_call(idea.code)
            segments = [
                Segment("demo", turn),
                Segment("tool", output),
                Segment("demo", steps + protocol.render_answer(idea.answer(output))),
            ]
            calls = [ToolCall(0, idea.code, "ok", output)]
        written = self.recipe.protocol.model_dump(mode="json", exclude={"instructions"})
        trace = Trace(f"trace:{problem.id}", problem, tuple(segments), len(calls), problem.family, written)
        await self._verify(trace, calls)
        return trace

    async def _execute(self, problem: Problem, code: str) -> str:
        """The observation that an episode would show. Raises `SandboxError` after the retries."""
        retries = self.recipe.sandbox.retries
        key = hashlib.blake2b(f"{problem.id}:{code}".encode(), digest_size=16).hexdigest()
        for attempt in range(retries + 1):
            try:
                result = await self.sandbox.exec(code, limits=self.limits, seed=self.data.seed, idempotency_key=key)
                break
            except SandboxError as error:
                if not error.retryable or attempt == retries:
                    raise
                await asyncio.sleep(_RETRY_S * 2**attempt)
        if not result.ok:
            raise _Rejected(f"execution: {result.status.value}")
        return render(result, self.recipe.rollout.observation_chars, self.limits)

    async def _verify(self, trace: Trace, calls: list[ToolCall]) -> None:
        """Format by the protocol's grammar, tokens by the codec, the answer by the run's own verifier."""
        reasons = self.codec.protocol.check(trace.rendered(self.codec.protocol, self.codec.escape))
        if reasons:
            raise _Rejected(f"format: {reasons[0]}")
        for segment in trace.segments:
            if segment.origin == "demo":
                try:
                    self.codec.demo_ids(segment.text)
                except CodecError as error:
                    raise _Rejected("text that this tokenizer cannot represent") from error
        trajectory = Trajectory(
            trace.id, trace.problem, trace.id, 0, 0, Transcript(), tool_calls=calls, policy_text=trace.policy_text
        )
        reward = await self.rewarder.score(trajectory)
        if reward.accuracy is None:
            raise _Rejected("answer: cannot be verified")
        if reward.accuracy < 1:
            raise _Rejected("answer: differs from the reference")
