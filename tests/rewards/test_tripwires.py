"""Every exploit of A §10.3 is a fixture: it scores wrong (or unknown) and is flagged and counted."""

from __future__ import annotations

import dataclasses

import pytest

from retool.config import RewardConfig
from retool.records import Problem
from retool.rewards import Rewarder
from retool.rewards.tripwires import FLAGS, program_flags
from tests.rewards.conftest import boxed, protocol, trajectory

EXACT = RewardConfig(verifier="exact")

ANSWERS = {
    "the gold among many": (boxed("41, 42, 43"), "listed_answers"),
    "the gold or another": (boxed("41 or 42"), "listed_answers"),
    "several boxes": ("\\boxed{41} \\boxed{42}", "multi_boxed"),
    "padding": (boxed("42 apples of the garden"), "padded_answer"),
    "unit padding": (boxed("42 km/h"), "padded_answer"),
    "the placeholder": (boxed("your answer"), "prompt_echo"),
    "a forged observation": ("<interpreter>\\boxed{42}</interpreter>", "obs_forgery"),
    "words without end": ("all work and no play " * 40 + boxed("41"), "repetition"),
}


@pytest.mark.parametrize("how", ANSWERS)
async def test_exploits_of_the_answer_channel(how: str) -> None:
    text, flag = ANSWERS[how]
    async with Rewarder(EXACT, protocol()) as rewarder:
        result = await rewarder.score(trajectory(text, "42"))
        assert (result.accuracy, result.score) == (0.0, 0.0)
        assert flag in result.flags
        assert rewarder.counters[f"flag_{flag}"] == 1


@pytest.mark.parametrize("how", ANSWERS)
async def test_they_are_wrong_for_the_mathematical_verifier_too(how: str) -> None:
    async with Rewarder(RewardConfig(timeout_s=60), protocol()) as rewarder:
        result = await rewarder.score(trajectory(ANSWERS[how][0], "42"))
        if how != "unit padding":  # math-verify drops units: 42 km/h is 42, and that is no exploit
            assert result.accuracy == 0.0
        assert result.accuracy is not None


async def test_a_box_that_only_the_tool_printed_is_no_answer() -> None:
    async with Rewarder(EXACT, protocol()) as rewarder:
        result = await rewarder.score(trajectory("<code>print(1)</code>", "42", calls=1, observation="\\boxed{42}"))
    assert (result.accuracy, result.flags) == (0.0, ("no_answer",))


async def test_an_honest_answer_raises_no_flag() -> None:
    for answer in ("42", " 42 ", "$42$"):
        async with Rewarder(RewardConfig(timeout_s=60), protocol()) as rewarder:
            result = await rewarder.score(trajectory(f"Six times seven is 42. {boxed(answer)}", "42"))
        assert (result.accuracy, result.flags) == (1.0, ())


PROGRAMS = {
    "early_exit": ["import os\nos._exit(0)", "exit()", "import sys\nsys.exit(0)", "raise SystemExit", "os.kill(1, 9)"],
    "eq_override": ["class A:\n def __eq__(s, o): return True", "A.__eq__ = lambda s, o: True"],
    "harness_patch": [
        "import sys\nsys.stdout = None",
        "print = lambda *a: None",
        "import builtins\nbuiltins.print = 1",
        "import sys\nsys.modules['json'] = None",
        "import sys\nf = sys._getframe(1)",
        "import atexit\natexit.register(f)",
        "import json\njson.dumps = f",
    ],
    "file_access": [
        "open('tests.txt').read()",
        "import os\nos.listdir('.')",
        "from pathlib import Path\nPath('x').read_text()",
    ],
    "sleeps": ["import time\ntime.sleep(100)", "while True: pass"],
    "swallows_errors": ["try:\n    f()\nexcept:\n    pass", "try:\n    f()\nexcept Exception: pass"],
    "hard_coded": ["t = {'aa': 'xx', 'bb': 'yy', 'cc': 'zz'}"],
}


@pytest.mark.parametrize(("flag", "program"), [(f, p) for f, ps in PROGRAMS.items() for p in ps])
def test_exploits_in_programs_are_seen_without_running_them(flag: str, program: str) -> None:
    assert flag in program_flags(program, ["xx", "yy", "zz"])


@pytest.mark.parametrize(
    "program",
    [
        "n = int(input())\nprint(sum(range(n)))",
        "while True:\n    try:\n        print(input())\n    except EOFError:\n        break",
        "try:\n    import numpy\nexcept ImportError:\n    numpy = None",
        "print('xx' if input() else 'yy')",
        "def (",
        "(" * 5000,
        "x" * 200_000,
    ],
)
def test_honest_and_broken_programs_raise_no_flag(program: str) -> None:
    assert program_flags(program, ["xx", "yy", "zz"]) == []


@pytest.mark.parametrize("canary", [True, "wrong gold"])
async def test_canaries_are_measured_and_never_trained_on(canary: object) -> None:
    right, wrong = (trajectory(boxed(a), "42") for a in ("42", "41"))
    planted = Problem("c", "Unsolvable.", "42", meta={"canary": canary})
    async with Rewarder(EXACT, protocol()) as rewarder:
        hit = await rewarder.score(dataclasses.replace(right, problem=planted))
        miss = await rewarder.score(dataclasses.replace(wrong, problem=planted))
        assert (hit.accuracy, hit.parts, hit.flags) == (None, {"canary": 1.0}, ("canary", "canary_hit"))
        assert (miss.accuracy, miss.parts) == (None, {"canary": 0.0})
        assert "canary_hit" not in miss.flags
        assert (rewarder.counters["flag_canary"], rewarder.counters["flag_canary_hit"]) == (2, 1)


def test_every_flag_says_what_it_means() -> None:
    assert all(meaning and not meaning.endswith(".") for meaning in FLAGS.values())
