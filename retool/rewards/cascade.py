"""Rule, judge, thinking judge: each asked only when the one before cannot settle it (Seed-Thinking-v1.5; A §7).

A rule that says *right* is believed. After a rule that says *wrong*, a judge that agrees settles it; a judge that
disagrees, is uncertain (soft score inside `band`) or says something unreadable sends the answer on to the thinking
judge, where there is one. Without one the judge's score stands (B §5.5: 1 if the rule matches, else soft).
"""

from __future__ import annotations

from collections import Counter

from retool.config.reward import JudgeConfig
from retool.records import Problem
from retool.rewards.judge import Judge, Ruling


async def judged(
    judge: Judge, config: JudgeConfig, rule: bool | None, problem: Problem, answer: str, counters: Counter[str]
) -> tuple[Ruling, str]:
    """(ruling, tier that gave it) of an answer that the rule did not find right."""
    ruling = await judge.rule(problem, answer)
    if ruling.score is None:
        return ruling, "judge"
    low, high = config.band
    uncertain = ruling.unparsable or low <= ruling.score <= high
    disagrees = rule is False and ruling.score > high
    counters["judge_overrules"] += disagrees
    if not (uncertain or disagrees) or config.thinking is None:
        return ruling, "judge"
    counters["escalations"] += 1
    final = await judge.think(problem, answer)
    return Ruling(final.score, tuple(dict.fromkeys((*ruling.flags, *final.flags)))), "thinking"
