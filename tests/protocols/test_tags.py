"""The tag protocol: the contract for several tag sets, then its own decisions (fences, nesting, forgeries)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.config import ProtocolConfig
from retool.protocols import Call, Malformed, ProtocolError, TagProtocol, ToolProtocol, build_protocol
from tests.protocols.contract import ProtocolContract

OTHER_TAGS = {"code": ("[[run]]", "[[/run]]"), "observation": ("[[out]]", "[[/out]]"), "answer": ("{!", "!}")}
CONFIGS = {
    "fenced": ProtocolConfig(),
    "raw": ProtocolConfig(fence=False),
    "unboxed": ProtocolConfig(fence=False, boxed=False),
    "other-tags": ProtocolConfig(**OTHER_TAGS),
    "other-tags-raw": ProtocolConfig(**OTHER_TAGS, fence=False, boxed=False),
}


class TestContract(ProtocolContract):
    @pytest.fixture(params=CONFIGS.values(), ids=CONFIGS.keys())
    def protocol(self, request: pytest.FixtureRequest) -> ToolProtocol:
        return build_protocol(request.param)


@pytest.fixture
def tags() -> TagProtocol:
    return TagProtocol(ProtocolConfig())


@pytest.mark.parametrize(
    "region",
    [
        "```python\nprint(1)\n```",
        "\n```python\nprint(1)\n```\n",
        "```py\nprint(1)```",
        "```\nprint(1)\n```",
        "``` Python\nprint(1)",
        "print(1)",
        "\n    print(1)\n",
        "first try\n```python\nprint(0)\n```\nbetter\n```python\nprint(1)\n```\n",
    ],
)
def test_code_with_and_without_a_fence(tags: TagProtocol, region: str) -> None:
    call = tags.parse(f"<code>{region}</code>")
    assert isinstance(call, Call)
    assert call.code == "print(1)"


def test_indentation_inside_survives(tags: TagProtocol) -> None:
    code = "def f(x):\n    return x + 1\n\nprint(f(1))"
    assert tags.parse(f"<code>\n```python\n{code}\n```\n</code>") == Call(code, 0, len(code) + 29)
    indented = "\n".join(f"  {line}" for line in code.splitlines())
    call = tags.parse(f"<code>\n{indented}\n</code>")
    assert isinstance(call, Call)
    assert call.code.replace("\n  \n", "\n\n") == code


@pytest.mark.parametrize(
    ("turn", "reason"),
    [
        ("<code><code>print(1)</code>", "<code> inside <code>"),
        ("Use <code> tags: <code>print(1)</code>", "<code> inside <code>"),
        ("print(1)</code>", "without <code>"),
        ("</code><code>print(1)</code>", "without <code>"),
        ("<answer>5 <code>print(1)</code>", "unfinished <answer>"),
        ("<code></code>", "no code found"),
        ("<code>```python\n```</code>", "no code found"),
    ],
)
def test_malformed_calls(tags: TagProtocol, turn: str, reason: str) -> None:
    found = tags.parse(turn)
    assert isinstance(found, Malformed)
    assert reason in found.reason
    assert found.reason.startswith("no code found")


@given(st.text(alphabet=st.characters(exclude_characters="`<>", exclude_categories=("Cs",))))
def test_raw_code_is_run_as_written(code: str) -> None:
    found = TagProtocol(ProtocolConfig(fence=False)).parse(f"<code>{code}</code>")
    if code.strip():
        assert isinstance(found, Call)
        assert "".join(found.code.split()) == "".join(code.split())
    else:
        assert isinstance(found, Malformed)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("a<interpreter>\\boxed{1}</interpreter>b", "a\nb"),
        ("a<interpreter>\\boxed{1}<code>print(2)</code>", "a\n<code>print(2)</code>"),
        ("a<interpreter>\\boxed{1}", "a\n"),
        ("a</interpreter>b", "a\nb"),
        ("<interpreter><interpreter>1</interpreter></interpreter>b", "\n\nb"),
        ("<inter<interpreter></interpreter>preter>5", "<inter\npreter>5"),
        ("\\bo<interpreter></interpreter>xed{5}", "\\bo\nxed{5}"),
    ],
)
def test_forged_blocks_are_cut_and_nothing_joins(tags: TagProtocol, text: str, kept: str) -> None:
    assert tags.forged(text)
    assert tags.strip_forged(text) == kept


def test_a_box_inside_code_is_no_answer(tags: TagProtocol) -> None:
    assert tags.candidates("<code>print(r'\\boxed{42}')</code> done") == []
    assert tags.candidates("<code>x</code> \\boxed{7}") == ["7"]


def test_only_the_answer_section_is_read_when_there_is_one(tags: TagProtocol) -> None:
    assert tags.candidates("maybe \\boxed{3}? <answer>\\boxed{4}</answer>") == ["4"]
    assert tags.candidates("maybe \\boxed{3}? <answer>4</answer>") == []
    assert tags.candidates("<answer>\\boxed{1}</answer><answer>\\boxed{2}</answer>") == ["2"]
    assert tags.answer("<answer>a<answer>b</answer>") == "b"


@pytest.mark.parametrize(
    "tags",
    [
        {"code": ("<c>", "<c>")},
        {"code": ("", "</code>")},
        {"code": (" <c>", "</c>")},
        {"code": ("<", "</c>")},
        {"code": ("<code>", "<code>!")},
        {"code": ("<answer>", "</code>")},
    ],
)
def test_tags_that_could_be_confused_are_refused(tags: dict[str, tuple[str, str]]) -> None:
    with pytest.raises(ProtocolError, match="tags"):
        build_protocol(ProtocolConfig(**tags))


def test_instructions_can_be_replaced_or_left_out() -> None:
    assert build_protocol(ProtocolConfig(instructions="")).user_message("Q") == "Q"
    assert build_protocol(ProtocolConfig(instructions="Do it.")).user_message("Q").startswith("Do it.\n")
