"""Parts of a score: vectors of the specification (TV-OVERLONG, TV-TOOLBONUS, appendix C 6 and 7), bounds, the sum."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from retool.config import RewardConfig
from retool.config.reward import (
    FormatConfig,
    LanguageConfig,
    OverlongConfig,
    ToolBonusConfig,
    TurnsConfig,
)
from retool.records import ToolCall
from retool.rewards import Rewarder
from retool.rewards.parts import (
    Facts,
    clipped,
    format_share,
    language_share,
    parts_of,
    tool_bonus,
    turn_penalties,
)
from retool.rewards.text import prose, without_special_tail
from retool.transcript import Span, Transcript
from tests.rewards.conftest import boxed, protocol, trajectory

R1 = FormatConfig()
SAME_LABELS = {"right": ["1 "], "wrong": ["1"]}
WELL_FORMED = "<think>\n2 and 2\n</think>\n<answer>\n\\boxed{4}\n</answer>"


@pytest.mark.parametrize(
    ("longest", "buffer", "length", "expected"),
    [
        (20480, 4096, 16384, 0.0),
        (20480, 4096, 16385, -0.000244140625),
        (20480, 4096, 18432, -0.5),
        (20480, 4096, 20480, -1.0),
        (20480, 4096, 20481, -1.0),
        *[(10, 4, n, e) for n, e in ((6, 0.0), (7, -0.25), (8, -0.5), (9, -0.75), (10, -1.0), (11, -1.0))],
    ],
)
def test_tv_overlong(longest: int, buffer: int, length: int, expected: float) -> None:
    config = OverlongConfig(max_tokens=longest, buffer=buffer)
    assert config.penalty(length) == pytest.approx(expected, abs=1e-12)
    assert config.model_copy(update={"factor": 0.5}).penalty(length) == pytest.approx(expected / 2, abs=1e-12)


def test_tv_toolbonus() -> None:
    calls = (0, 1, 2, 4, 8)
    verl, slime = ToolBonusConfig(), ToolBonusConfig(count="slime")
    assert [-1 + tool_bonus(k, verl) for k in calls] == pytest.approx([-1, -0.9, -0.8, -0.6, -0.6])
    assert [-1 + tool_bonus(k, slime) for k in calls] == pytest.approx([-1.1, -1.05, -1.0, -0.9, -0.7])


def test_the_tool_bonus_is_for_wrong_answers_alone() -> None:
    config = RewardConfig(wrong=-1, tool_bonus=ToolBonusConfig())
    assert parts_of(Facts(0.0, 0.0, n_calls=2), config)["tool_bonus"] == pytest.approx(0.2)
    assert "tool_bonus" not in parts_of(Facts(1.0, 1.0, n_calls=2), config)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (WELL_FORMED, 1.0),
        (f"  {WELL_FORMED}\n", 1.0),
        (WELL_FORMED + " trailing text", 0.0),  # appendix C 6
        ("<think>a</think>" + WELL_FORMED, 0.0),  # appendix C 6: duplicated <think>
        ("before " + WELL_FORMED, 0.0),
        ("<think>a</think> between <answer>4</answer>", 0.0),
        ("<think>a<answer>4</answer></think>", 0.0),  # nested
        ("<think><think>a</think></think><answer>4</answer>", 0.0),
        ("<answer>4</answer><think>a</think>", 0.0),
        ("</think>a<think><answer>4</answer>", 0.0),
        ("<think>a</think><answer>4", 0.0),
        ("", 0.0),
    ],
)
def test_appendix_c_6_strict_format(text: str, expected: float) -> None:
    assert format_share(text, R1) == expected


def test_appendix_c_6_graded_format_counts_each_tag_once() -> None:
    graded = R1.model_copy(update={"kind": "graded"})
    assert format_share(WELL_FORMED, graded) == 1.0
    assert format_share("<think>a</think>", graded) == 0.5
    assert format_share("<think>" * 50 + "</think>", graded) == 0.25  # tag spam
    assert format_share("no tags", graded) == 0.0


def test_text_may_lead_where_the_recipe_says_so() -> None:
    config = FormatConfig(tags=(("<answer>", "</answer>"),), leading_text=True)
    assert format_share(f"First <code>print(4)</code> then {boxed('4')}", config) == 1.0
    assert format_share(f"{boxed('4')} and more", config) == 0.0


def test_the_end_of_turn_token_is_no_trailing_text() -> None:
    for end in ("<|im_end|>", "</s>", "<|end|>\n", "<|im_end|> <|endoftext|>"):
        assert without_special_tail(WELL_FORMED + end).rstrip() == WELL_FORMED
    assert without_special_tail("a < b|> c") == "a < b|> c"


def test_appendix_c_7_language() -> None:
    words = "one two three four five six seven eight это слово"
    code = "<code>\n```python\nпечать = 'много слов'\n```\n</code>"
    assert language_share(prose(words, protocol()), "en") == 0.8
    mathematics = " $\\alpha + ж$ \\(x_п\\) 12 34 \\frac{}{} `код` ```py\nи код\n```"
    assert language_share(prose(words + code + mathematics, protocol()), "en") == pytest.approx(0.8)
    assert language_share(prose("你好 hello", protocol()), "zh") == pytest.approx(2 / 3)
    assert language_share(prose("これは test", protocol()), "ja") == pytest.approx(3 / 4)
    assert language_share(prose("don't stop", protocol()), "en") == 1.0


def test_appendix_c_7_a_response_without_words_earns_nothing_and_is_flagged() -> None:
    facts = Facts(1.0, 1.0, prose=prose("$x$ 12 <code>a</code>", protocol()))
    parts = parts_of(facts, RewardConfig(language=LanguageConfig()))
    assert parts["language"] == 0.0
    assert facts.flags == ["no_words"]


def test_hostile_texts_are_read_in_linear_time() -> None:
    for piece in ("\\(", "$", "```", "`", "<code>", "<|", "</s>", "<think>", "\\[", "a'"):
        text = piece * (10**6 // len(piece))
        language_share(prose(text, protocol()), "en")
        format_share(text, R1)
        assert without_special_tail(text) == text or piece == "</s>"  # a quadratic pass would not end


def call(turn: int, status: str) -> ToolCall:
    return ToolCall(turn, "", status, "")


def test_turns_pay_for_their_calls_up_to_a_cap() -> None:
    config = TurnsConfig(failed_call=0.1, malformed=0.2, cap=0.25)
    calls = [call(0, "error"), call(1, "ok"), call(2, "malformed"), call(3, "timeout")]
    assert turn_penalties(calls, 5, config) == pytest.approx([-0.1, 0, -0.15, 0, 0])


def test_r1_sums_accuracy_and_format() -> None:
    """TV-GRPO: acc+format sums [2, 1, 1, 0]."""
    config = RewardConfig(format=FormatConfig(weight=1.0), right_wins=False)
    sums = [sum(parts_of(Facts(a, a, text), config).values()) for a in (1.0, 0.0) for text in (WELL_FORMED, "no")]
    assert sums == [2.0, 1.0, 1.0, 0.0]
    with pytest.raises(ValidationError, match="right_wins"):
        RewardConfig(format=FormatConfig(weight=1.0))


WEIGHT = st.none() | st.floats(0.01, 2)


@given(
    correct=st.floats(-2, 2),
    wrong=st.floats(-2, 2),
    form=WEIGHT,
    language=WEIGHT,
    overlong=WEIGHT,
    bonus=WEIGHT,
    call_cap=st.floats(0, 1),
    clip=st.none() | st.tuples(st.floats(-3, 3), st.floats(-3, 3)),
    right=st.tuples(st.sampled_from(["", WELL_FORMED]), st.integers(0, 9), st.integers(0, 30)),
    other=st.tuples(st.sampled_from(["", WELL_FORMED]), st.integers(0, 9), st.integers(0, 30)),
)
def test_no_wrong_answer_outscores_a_right_one_whatever_the_parts(
    correct: float,
    wrong: float,
    form: float | None,
    language: float | None,
    overlong: float | None,
    bonus: float | None,
    call_cap: float,
    clip: tuple[float, float] | None,
    right: tuple[str, int, int],
    other: tuple[str, int, int],
) -> None:
    try:
        config = RewardConfig(
            correct=correct,
            wrong=wrong,
            call_cost=0.1,
            max_call_cost=call_cap,
            format=form and FormatConfig(weight=form),
            language=language and LanguageConfig(weight=language),
            overlong=overlong and OverlongConfig(max_tokens=10, buffer=4, factor=overlong),
            tool_bonus=bonus and ToolBonusConfig(cap=bonus, per_call=0.3),
            clip=clip,
        )
    except ValidationError:
        return
    if config.overlap(longest=30):
        return
    scores = []
    for accuracy, (text, calls, length) in ((1.0, right), (0.0, other)):
        facts = Facts(accuracy, accuracy, text, text, calls, length, length)
        scores.append(clipped(sum(parts_of(facts, config).values()), config))
    assert scores[0] > scores[1]


async def test_a_trajectory_gets_all_its_parts_and_the_clip() -> None:
    config = RewardConfig(
        verifier="exact",
        wrong=-1,
        format=FormatConfig(weight=0.2),
        language=LanguageConfig(weight=0.1),
        overlong=OverlongConfig(max_tokens=8, buffer=4, factor=0.4),
        clip=(-1.0, 0.9),
    )
    mine = trajectory("<think>one two</think><answer>\\boxed{42}</answer><|im_end|>", "42")
    prompt, said = Span("prompt", (1, 2)), Span("policy", (3,) * 6, logprobs=(-1.0,) * 6, versions=((0, 0),))
    mine.transcript = Transcript([prompt, said, Span("tool", (4,) * 50, kind="observation")])
    async with Rewarder(config, protocol()) as rewarder:
        result = await rewarder.score(mine)
        assert result.parts == pytest.approx(
            {"answer": 1, "calls": 0, "format": 0.2, "language": 0.1, "overlong": -0.2}
        )
        assert result.score == 0.9  # 1.1, clipped
    counting_all = config.model_copy(
        update={"overlong": OverlongConfig(max_tokens=8, buffer=4, factor=0.4, count="all")}
    )
    async with Rewarder(counting_all, protocol()) as rewarder:
        assert (await rewarder.score(mine)).parts["overlong"] == pytest.approx(-0.4)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"verifier": "judge"}, "needs reward.judge"),
        ({"judge": {"url": "http://x/v1", "model": "m"}}, "not used"),
        ({"verifier": "judge", "judge": {"url": "x", "model": "m"}}, "http"),
        (
            {
                "verifier": "judge",
                "judge": {"url": "http://x", "model": "m", "labels": {"right": ["1 "], "wrong": ["1"]}},
            },
            "common",
        ),
        ({"verifier": "judge", "judge": {"url": "http://x", "model": "m", "thinking": {}}}, "cascade"),
        ({"verifier": "judge", "judge": {"url": "http://x", "model": "m", "prompt": "{answer}"}}, "reference"),
        ({"verifier": "judge", "judge": {"url": "http://x", "model": "m"}, "format": {"weight": 0.01}}, "soft scores"),
        ({"overlong": {"max_tokens": 10, "buffer": 11}}, "must not exceed"),
        ({"turns": {"cap": 1.0}}, "right_wins"),
        ({"clip": [1, 0]}, "ascending"),
        ({"shaping": {}, "shuffle": True}, "single turns"),
        ({"format": {"tags": [["<a>", "<a>"]]}}, "differ"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(section: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        RewardConfig(**section)  # type: ignore[arg-type]
