"""The `reward` section: who decides whether an answer is right, what is added to it, and what that may never break.

docs/rewards.md has the formulas, their sources, and what each reward can be hacked by.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from retool.config.base import Section

if TYPE_CHECKING:
    from retool.config.recipe import Recipe

Language = Literal["en", "zh", "ja", "ko", "ru", "ar", "he", "el", "hi", "th"]


class FormatConfig(Section):
    """A reward for the response's outer form (A §4.1). Not accuracy: a wrong answer earns it too."""

    weight: float = Field(0.1, gt=0)
    """What a well-formed response earns; R1 uses as much as for accuracy (then `right_wins: false`)."""
    kind: Literal["strict", "graded"] = "strict"
    """`strict`: all or nothing, anchored at both ends. `graded`: an equal share for each tag that stands there exactly
    once."""
    tags: tuple[tuple[str, str], ...] = (("<think>", "</think>"), ("<answer>", "</answer>"))
    """Sections in order, each an opening and a closing tag."""
    leading_text: bool = False
    """Whether text may stand before the first tag and between sections, as in ReTool's responses."""

    @model_validator(mode="after")
    def _tags_are_tags(self) -> FormatConfig:
        flat = [t for pair in self.tags for t in pair]
        if (
            not flat
            or any(not t.strip() for t in flat)
            or any(a in b for i, a in enumerate(flat) for j, b in enumerate(flat) if i != j)
        ):
            raise ValueError(f"tags must be given, differ, and not contain one another: {flat}")
        return self


class LanguageConfig(Section):
    """R1's language consistency (A §4.1): share of words in the target language, code and mathematics left out."""

    weight: float = Field(0.1, gt=0)
    """Earned by a response wholly in the language."""
    language: Language = "en"
    """By script: `en` counts Latin letters, so it cannot tell English from German."""


class OverlongConfig(Section):
    """DAPO's soft overlong punishment (2503.14476, eq. 13): 0 up to max_tokens - buffer, then linear to -factor."""

    max_tokens: int = Field(ge=1)
    """Length in tokens at which the punishment is full (L_max); left out in a recipe: `rollout.max_tokens`."""
    buffer: int = Field(ge=1)
    """Tokens over which it grows (L_cache); left out in a recipe: a fifth of `max_tokens`, as in the paper."""
    factor: float = Field(1.0, gt=0)
    """The full punishment."""
    count: Literal["action", "all"] = "action"
    """`action`: the policy's tokens. `all`: tool output too, as verl counts: it then punishes long outputs."""

    @model_validator(mode="after")
    def _buffer_fits(self) -> OverlongConfig:
        if self.buffer > self.max_tokens:
            raise ValueError(f"buffer ({self.buffer}) must not exceed max_tokens ({self.max_tokens})")
        return self

    def penalty(self, length: int) -> float:
        """What a response of so many tokens gets, in [-factor, 0]."""
        excess = length - (self.max_tokens - self.buffer)
        return -self.factor * min(excess / self.buffer, 1.0) if excess > 0 else 0.0


class ToolBonusConfig(Section):
    """verl's bonus for tool calls of *wrong* answers. Not in the paper, not potential-based; it teaches calling for its
    own sake in groups without a right answer (A §1.8). For comparisons only."""

    per_call: float = Field(0.1, gt=0)
    """Bonus a call."""
    cap: float = Field(0.4, gt=0)
    """Most that calls may earn."""
    count: Literal["verl", "slime"] = "verl"
    """`verl`: k calls earn k times. `slime` reuses the formula with turns = k, so that 0 calls score below `wrong`."""


class TurnsConfig(Section):
    """Punishments of single turns (GTPO's turn rewards, 2511.14846), given to the turn that earned them."""

    failed_call: float = Field(0.0, ge=0)
    """Subtracted from a turn whose call did not end well."""
    malformed: float = Field(0.0, ge=0)
    """Subtracted from a turn whose call could not be run."""
    cap: float = Field(0.5, ge=0)
    """Most that a trajectory may lose in this way."""


class ShapingConfig(Section):
    """Potential-based shaping (Ng et al. 1999): turn k earns gamma * potential(s_k) - potential(s_k-1), and the
    terminal potential is 0 whatever the function says, so that the order of policies is unchanged."""

    potential: str = "last_call_ok"
    """`last_call_ok`, `calls_ok`, or `module:function` of yours: (trajectory, turns done) -> float."""
    gamma: float = Field(1.0, gt=0, le=1)
    """Discount a turn; must be the objective's."""


class UnitTestsConfig(Section):
    """Running a problem's tests (`verifier: unit_tests`)."""

    fraction: bool = False
    """Score the share of passed tests instead of all-or-nothing. Hackable: special-casing some tests pays."""
    max_tests: int = Field(50, ge=1)
    """Most tests run a program; hidden ones first."""
    profile: str = "py-bare"
    """Warm interpreter that tests run in."""
    wall_s: float = Field(6.0, gt=0)
    """Wall clock limit of one test in seconds."""
    cpu_s: float = Field(6.0, gt=0)
    """CPU limit of one test in seconds."""
    memory_mb: int = Field(512, ge=16)
    """Memory of one test in MiB."""
    tolerance: float = Field(0.0, ge=0)
    """Numbers may differ by so much (absolute or relative); 0: outputs must be the same text."""
    retries: int = Field(3, ge=0)
    """Tries after a failure of the sandbox; then the reward is unknown."""
    concurrency: int = Field(16, ge=1)
    """Tests in the sandbox at once."""


class LabelsConfig(Section):
    """What the judge says. Each string is one token for the judge; blanks around it do not count. In YAML put quotes
    around them: a bare YES is a boolean there."""

    right: tuple[str, ...] = ("YES", "Yes", "yes")
    """Right; their probabilities are added up."""
    wrong: tuple[str, ...] = ("NO", "No", "no")
    """Wrong."""

    @model_validator(mode="after")
    def _apart(self) -> LabelsConfig:
        yes, no = ({s.strip() for s in side} for side in (self.right, self.wrong))
        if not yes or not no or "" in yes | no or yes & no:
            raise ValueError(
                f"labels: right {self.right} and wrong {self.wrong} must both be given and have nothing in common"
            )
        return self


class ThinkingConfig(Section):
    """The third tier of a cascade: a judge that reasons first and is asked several times (Seed-Thinking-v1.5)."""

    url: str | None = None
    """Server; default: the judge's."""
    model: str | None = None
    """Model; default: the judge's."""
    votes: int = Field(3, ge=1)
    """Answers; the majority decides, and a tie leaves the reward unknown."""
    max_tokens: int = Field(4096, ge=1)
    """Longest answer in tokens."""
    temperature: float = Field(0.7, ge=0)
    """Sampling temperature of the votes."""


class JudgeConfig(Section):
    """A language model as verifier, behind any OpenAI-compatible server (2503.23829)."""

    url: str
    """Base URL up to and with `/v1`."""
    model: str
    """Model name that the server knows."""
    token_env: str | None = None
    """Name of the environment variable with the API key; the key itself never stands in a recipe."""
    labels: LabelsConfig = LabelsConfig()
    """The verdict's strings."""
    soft: Literal["paper", "renormalised", "binary"] = "paper"
    """`paper`: p(yes) when it says yes, 1 - p(no) when it says no. `renormalised`: p(yes) / (p(yes) + p(no)).
    `binary`: 1 or 0."""
    threshold: float = Field(0.5, ge=0, lt=1)
    """A soft score above this counts as right: accuracy, which filters read."""
    band: tuple[float, float] = (0.2, 0.8)
    """Cascade: a soft score between these is uncertain and goes to the thinking judge."""
    prompt: str | None = None
    """Own prompt with `{question}`, `{reference}` and `{answer}`; default: the built-in one."""
    max_chars: int = Field(500, ge=1)
    """Longest answer shown to the judge."""
    top_logprobs: int = Field(20, ge=2, le=100)
    """Alternatives asked for; a label outside of them has probability 0."""
    timeout_s: float = Field(60.0, gt=0)
    """A request that takes longer has failed."""
    retries: int = Field(3, ge=0)
    """Tries after a failed request; then the reward is unknown."""
    concurrency: int = Field(16, ge=1)
    """Requests at once."""
    audit: float = Field(0.0, ge=0, le=1)
    """Share of the answers that a rule found right, to be shown to the judge too; the lower verdict counts and
    disagreements are counted (needs `verifier: math` or `exact`)."""
    thinking: ThinkingConfig | None = None
    """The third tier of a cascade."""

    @model_validator(mode="after")
    def _sound(self) -> JudgeConfig:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge.url {self.url!r}: write http://HOST:PORT/v1")
        if not 0 <= self.band[0] <= self.band[1] <= 1:
            raise ValueError(f"judge.band {self.band} must be two ascending numbers in [0, 1]")
        if self.prompt is not None and any(f"{{{name}}}" not in self.prompt for name in ("reference", "answer")):
            raise ValueError("judge.prompt must hold {reference} and {answer}")
        return self


class RewardConfig(Section):
    """From a trajectory to its score. A wrong answer never scores as much as a right one."""

    verifier: Literal["math", "exact", "unit_tests", "judge", "cascade"] = "math"
    """`math`: math-verify and sympy in killable workers. `exact`: string equality after trimming. `unit_tests`: the
    answer is a program, run on the problem's tests. `judge`: a language model. `cascade`: rule, judge, thinking
    judge."""
    rule: Literal["math", "exact"] = "math"
    """First tier of a cascade."""
    correct: float = 1.0
    """Score of a right answer."""
    wrong: float = 0.0
    """Score of a wrong answer."""
    call_cost: float = Field(0.0, ge=0)
    """Subtracted for each tool call of a *right* answer, up to `max_call_cost`."""
    max_call_cost: float = Field(0.0, ge=0)
    """Most that calls may cost; must stay below correct - wrong."""
    format: FormatConfig | None = None
    """Reward for the response's form."""
    language: LanguageConfig | None = None
    """Reward for keeping to one language."""
    overlong: OverlongConfig | None = None
    """Soft punishment of long responses."""
    tool_bonus: ToolBonusConfig | None = None
    """verl's bonus for calls of wrong answers; off, and better left off."""
    turns: TurnsConfig | None = None
    """Punishments of single turns."""
    shaping: ShapingConfig | None = None
    """Potential-based shaping over turns."""
    clip: tuple[float, float] | None = None
    """Bounds of the final score."""
    right_wins: bool = True
    """Refuse settings with which a wrong answer could score as much as a right one. R1's equal weights need false."""
    zscore: Literal["none", "batch"] = "none"
    """`batch`: (score - mean) / standard deviation over all trajectories of a step (2503.23829)."""
    tests: UnitTestsConfig = UnitTestsConfig()
    """Running unit tests."""
    judge: JudgeConfig | None = None
    """The judge's server."""
    timeout_s: float = Field(10.0, gt=0)
    """A verifier worker that takes longer is killed; the reward is then unknown after `retries`."""
    workers: int = Field(1, ge=1)
    """Verifier processes."""
    retries: int = Field(1, ge=0)
    """Tries after a worker was killed or died."""
    custom: str | None = None
    """Dotted path `module:function` of your own reward: (trajectory, RewardResult) -> RewardResult.
    It may break the rule that a right answer outscores a wrong one: that is then yours to keep."""
    shuffle: bool = False
    """Control experiment: permute scores over the trajectories of a step."""

    @property
    def soft(self) -> bool:
        """Whether right and wrong answers have scores in between."""
        if self.verifier == "unit_tests":
            return self.tests.fraction
        return self.verifier in ("judge", "cascade") and self.judge is not None and self.judge.soft != "binary"

    def bounds(self, longest: int) -> tuple[float, float]:
        """(lowest score of a right answer, highest score of a wrong one) of responses of at most `longest` tokens."""
        extra = sum(part.weight for part in (self.format, self.language) if part is not None)
        loss = (self.turns.cap if self.turns else 0.0) - (self.overlong.penalty(longest) if self.overlong else 0.0)
        right = self.correct - self.max_call_cost - loss
        wrong = self.wrong + extra + (self.tool_bonus.cap if self.tool_bonus else 0.0)
        if self.soft:  # only the order of the soft scores is left, and any addition may turn it round
            bare = right == self.correct and wrong == self.wrong
            right, wrong = (self.correct, self.wrong) if bare else (self.wrong, self.correct)
        if self.clip is not None:
            right, wrong = (min(max(x, self.clip[0]), self.clip[1]) for x in (right, wrong))
        return right, wrong

    @model_validator(mode="after")
    def _right_beats_wrong(self) -> RewardConfig:
        if self.correct - self.max_call_cost <= self.wrong:
            raise ValueError(
                f"correct ({self.correct}) - max_call_cost ({self.max_call_cost}) must stay above wrong ({self.wrong})"
            )
        if self.clip is not None and self.clip[0] >= self.clip[1]:
            raise ValueError(f"clip {self.clip} must be two ascending numbers")
        if why := self.overlap(0):
            raise ValueError(why)
        return self

    def overlap(self, longest: int) -> str:
        """How a wrong answer could score as much as a right one, against `right_wins`; empty when it cannot."""
        right, wrong = self.bounds(longest)
        if not self.right_wins or right > wrong:
            return ""
        return (
            f"with these parts a right answer may score {right:g} and a wrong one {wrong:g}: lower weights, factor or "
            "caps, widen correct - wrong, or set right_wins: false"
            + (" (soft scores leave no room for additions)" if self.soft else "")
        )

    @model_validator(mode="after")
    def _fits_together(self) -> RewardConfig:
        if self.verifier in ("judge", "cascade") and self.judge is None:
            raise ValueError(f"verifier {self.verifier} needs reward.judge with url and model")
        if self.judge is not None and self.verifier in ("math", "exact", "unit_tests") and not self.judge.audit:
            raise ValueError(f"reward.judge is not used by verifier {self.verifier}: set judge.audit, or leave it out")
        if self.judge is not None and self.judge.audit and self.verifier not in ("math", "exact"):
            raise ValueError("judge.audit is for verifier math or exact")
        if self.judge is not None and self.judge.thinking is not None and self.verifier != "cascade":
            raise ValueError("judge.thinking is the third tier of verifier cascade")
        if (self.shaping or self.turns) and (self.shuffle or self.zscore != "none"):
            raise ValueError("rewards of single turns (shaping, turns) cannot be shuffled or z-scored")
        return self


def reward_errors(recipe: Recipe) -> Iterator[str]:
    """What a reward and the rest of a recipe cannot do together."""
    reward, o = recipe.reward, recipe.objective
    if why := reward.overlap(recipe.rollout.max_tokens):
        yield f"reward, responses of {recipe.rollout.max_tokens} tokens (rollout.max_tokens): {why}"
    group_std = o.advantage.kind == "zscore"
    if reward.zscore == "batch" and group_std and o.advantage.std != "none":
        yield (
            "reward.zscore=batch with objective.advantage.kind=zscore normalises twice and loses the scale of the "
            "scores: drop one of them"
        )
    if reward.zscore == "batch" and recipe.rollout.dynamic.kind != "none":
        yield "reward.zscore=batch is over all scores of a step, rollout.dynamic samples in several batches: drop one"
    if reward.verifier == "unit_tests" and recipe.protocol.name == "fenced":
        yield "reward.verifier=unit_tests: protocol.name=fenced would run the answer, a fenced program, as a call"
    if reward.verifier == "unit_tests" and recipe.protocol.boxed:
        yield "reward.verifier=unit_tests reads the whole answer section as a program: set protocol.boxed=false"


def reward_warnings(recipe: Recipe) -> Iterator[str]:
    """What is allowed and probably not meant."""
    reward, o = recipe.reward, recipe.objective
    if reward.zscore == "batch" and o.advantage.kind in ("mean", "rloo"):
        yield "reward.zscore=batch is undone by the group baseline up to its scale; it is meant for other estimators"
    if reward.tool_bonus is not None and o.filter.kind == "keep":
        yield (
            "reward.tool_bonus makes groups without a right answer differ by their number of calls alone: the policy "
            "learns to call for its own sake; set objective.filter.kind=drop"
        )
    if reward.verifier == "unit_tests" and reward.tests.fraction:
        yield "reward.tests.fraction pays for special-casing single tests; watch hidden-test accuracy"
    if reward.soft and o.filter.kind != "keep":
        yield "soft rewards are filtered by accuracy (score above reward.judge.threshold), not by their soft score"
    right, wrong = reward.bounds(recipe.rollout.max_tokens)
    if not reward.right_wins and right <= wrong:
        yield f"reward.right_wins=false: a right answer may score {right:g} and a wrong one {wrong:g}"
