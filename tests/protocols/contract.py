"""What every `ToolProtocol` must do. A test module makes the fixture `protocol` and inherits `ProtocolContract`."""

from __future__ import annotations

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retool.protocols import Call, Malformed, ToolProtocol

CODE = "x = 6\nprint(x * 7)"
_SETTINGS = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def observed(protocol: ToolProtocol, text: str) -> str:
    return "".join(protocol.observation(text))


class ProtocolContract:
    """Inherit and provide a `protocol` fixture."""

    def test_a_written_call_is_read_back(self, protocol: ToolProtocol) -> None:
        turn = f"I compute. {protocol.render_call(CODE)}"
        call = protocol.parse(turn)
        assert isinstance(call, Call)
        assert call.code == CODE
        assert turn[call.start : call.end] == protocol.render_call(CODE)
        assert turn[: call.start] == "I compute. "
        assert turn[: call.end].endswith(protocol.stop)

    def test_a_call_ends_with_a_stop_string_and_opens_with_call_open(self, protocol: ToolProtocol) -> None:
        call = protocol.render_call(CODE)
        assert call.endswith(protocol.stop)
        assert call.startswith(protocol.call_open)
        assert protocol.call_open in protocol.control
        assert set(protocol.stop) <= set(protocol.control)

    def test_text_without_a_call_is_no_call(self, protocol: ToolProtocol) -> None:
        assert protocol.parse("") is None
        assert protocol.parse("The answer is 4.") is None
        assert protocol.parse(protocol.render_answer("4")) is None
        assert protocol.parse(f"{protocol.call_open}print(1)") is None

    def test_the_last_call_of_a_turn_counts(self, protocol: ToolProtocol) -> None:
        call = protocol.parse(protocol.render_call("print(1)") + " and " + protocol.render_call("print(2)"))
        assert isinstance(call, Call)
        assert call.code == "print(2)"

    def test_an_empty_call_is_malformed_and_says_so(self, protocol: ToolProtocol) -> None:
        for empty in ("", "  \n "):
            found = protocol.parse(protocol.render_call(empty))
            assert isinstance(found, Malformed)
            assert "no code found" in found.reason

    def test_a_call_after_the_answer_is_not_run(self, protocol: ToolProtocol) -> None:
        assert protocol.parse(protocol.render_answer("4") + protocol.render_call(CODE)) is None

    def test_what_the_sampled_token_brought_along_is_ignored(self, protocol: ToolProtocol) -> None:
        call = protocol.parse(protocol.render_call(CODE) + "\n")
        assert isinstance(call, Call)
        assert call.code == CODE

    def test_a_written_answer_is_read_back(self, protocol: ToolProtocol) -> None:
        for answer in ("42", "\\frac{1}{2}", "x = 3, y = 4", "{1, 2}"):
            text = f"So it is {protocol.render_answer(answer)}"
            assert protocol.candidates(text) == [answer]
            assert protocol.answer(text) is not None
        assert protocol.answer("so it is 42") is None

    def test_an_observation_offers_no_answer_and_its_forgery_is_seen(self, protocol: ToolProtocol) -> None:
        forged = f"so {observed(protocol, protocol.render_answer('42'))} thus"
        assert protocol.forged(forged)
        honest = protocol.strip_forged(forged)
        assert not protocol.forged(honest)
        assert protocol.candidates(honest) == []
        assert honest.startswith("so ")
        assert honest.endswith(" thus")

    def test_honest_text_is_not_forged(self, protocol: ToolProtocol) -> None:
        text = protocol.render_call(CODE) + protocol.render_answer("4")
        assert not protocol.forged(text)
        assert protocol.strip_forged(text) == text

    def test_a_well_formed_trace_passes_the_check(self, protocol: ToolProtocol) -> None:
        trace = f"First.{protocol.render_call(CODE)}{observed(protocol, '42')}Then.{protocol.render_answer('42')}"
        assert protocol.check(trace) == []
        assert protocol.check(protocol.render_answer("42")) == []

    def test_broken_traces_fail_the_check(self, protocol: ToolProtocol) -> None:
        call, seen, answer = protocol.render_call(CODE), observed(protocol, "42"), protocol.render_answer("42")
        broken = [
            "",
            "42",
            call + answer,
            seen + answer,
            call + seen,
            call + seen + seen + answer,
            call + "so" + seen + answer,
            answer + call + seen,
            answer + answer,
            answer + "and more",
            protocol.call_open + call + seen + answer,
            protocol.render_call("x = 1") + seen + answer,
            protocol.render_call("") + seen + answer,
        ]
        for trace in broken:
            assert protocol.check(trace), trace

    def test_instructions_name_the_tags_and_the_question_comes_last(self, protocol: ToolProtocol) -> None:
        message = protocol.user_message("What is 2+2?")
        assert message.endswith("What is 2+2?")
        assert protocol.call_open in protocol.instructions()

    @_SETTINGS
    @given(data=st.data())
    def test_hostile_text_never_breaks_it(self, protocol: ToolProtocol, data: st.DataObject) -> None:
        """Any mixture of control strings and text: no exception, ranges inside the text, no forgery left over."""
        words = st.sampled_from([*protocol.control, "```python\n", "```", "\n", "print(1)", "\\boxed{", "}", "<", ">"])
        text = "".join(data.draw(st.lists(words | st.text(max_size=4), max_size=14)))
        found = protocol.parse(text)
        if found is not None:
            assert 0 <= found.start <= found.end <= len(text)
            assert any(stop in text for stop in protocol.stop)
        if isinstance(found, Call):
            assert found.code.strip()
            assert not any(tag in found.code for tag in protocol.stop)
        assert not protocol.forged(protocol.strip_forged(text))
        assert all(isinstance(c, str) and c for c in protocol.candidates(text))
        assert isinstance(protocol.check(text), list)
