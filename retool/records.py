"""The records that travel between collector, reward, log and learner: problem, tool call, reward, trajectory, group."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from retool.transcript import Transcript

TrajectoryStatus = Literal["finished", "truncated_length", "truncated_turns", "truncated_tool", "aborted"]


@dataclass(frozen=True)
class Problem:
    """A question with a verifiable answer. The answer never enters the prompt or the sandbox."""

    id: str
    prompt: str
    answer: str
    source: str = ""
    family: str = ""
    meta: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ToolCall:
    """One call of the interpreter. `status` is the sandbox's outcome name, or `malformed` when nothing could be run."""

    turn: int
    code: str
    status: str
    observation: str
    queue_ms: float = 0.0
    run_ms: float = 0.0
    digest: str = ""

    @property
    def ok(self) -> bool:
        return self.status == "ok"


@dataclass(frozen=True)
class RewardResult:
    """`accuracy` is what a filter reads (None = the verifier could not decide), `score` what is optimised.

    `turn_rewards`: where rewards are given by turns, one figure for each turn of the policy; together with `score` on
    the last turn they are what each turn earned. Without discount they add up to 0. Otherwise empty.
    """

    accuracy: float | None
    score: float
    parts: dict[str, float] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    verifier: str = ""
    answer: str | None = None
    turn_rewards: tuple[float, ...] = ()


@dataclass
class Trajectory:
    """One episode. `id` is unique in a run: `{step}.{group}.{index}`. `seed` keys every random choice in it."""

    id: str
    problem: Problem
    group: str
    index: int
    seed: int
    transcript: Transcript
    status: TrajectoryStatus = "finished"
    tool_calls: list[ToolCall] = field(default_factory=list)
    reward: RewardResult | None = None
    flags: tuple[str, ...] = ()
    policy_text: str = ""  # decoded text of the policy's spans only, what a verifier may see
    seconds: float = 0.0
    error: str = ""  # why it was aborted

    @property
    def usable(self) -> bool:
        """False when our own failure or an undecided verifier leaves nothing to learn from."""
        return self.status != "aborted" and self.reward is not None and self.reward.accuracy is not None


@dataclass
class Group:
    """The G trajectories of one problem."""

    id: str
    step: int
    problem: Problem
    trajectories: list[Trajectory]

    @property
    def usable(self) -> list[Trajectory]:
        return [t for t in self.trajectories if t.usable]


@dataclass(frozen=True)
class TrainSample:
    """One row for the learner: a view of a transcript and the columns that objectives may read.

    `problem`: its id, which is the same in every step. `turn_rewards`: see `RewardResult`.
    `format_penalty`: 1 without an answer, else
    repeated answers a turn, at most 1.
    """

    id: str
    group: str
    sample: Any  # retool.transcript.Sample
    score: float = 0.0
    accuracy: float = 0.0
    pair: int = -1
    parent: int = -1
    cluster: int = -1
    tool_error_rate: float = 0.0
    void: bool = False
    in_baseline: bool = True
    in_loss: bool = True
    truncated: bool = False
    problem: str = ""
    turn_rewards: tuple[float, ...] = ()
    tool_calls: int = 0
    format_penalty: float = 0.0
