"""The ledger: derived masks agree with the spans, and spans that would lie are refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retool.transcript import KINDS, LedgerError, Sample, Span, Transcript, digest_tokens

ids = st.lists(st.integers(0, 50_000), min_size=1, max_size=8).map(tuple)


@st.composite
def spans(draw: st.DrawFn) -> Span:
    tokens = draw(ids)
    origin = draw(st.sampled_from(["policy", "tool", "forced", "demo"]))
    if origin == "policy":
        logprobs = tuple(draw(st.lists(st.floats(-20, 0), min_size=len(tokens), max_size=len(tokens))))
        return Span(
            "policy", tokens, logprobs=logprobs, versions=((0, 3),), code=(0, draw(st.integers(0, len(tokens))))
        )
    kind = draw(st.sampled_from(["text", "observation"]))
    return Span(origin, tokens, kind=kind)


@given(prompt=ids, rest=st.lists(spans(), max_size=6))
def test_columns_have_one_entry_a_token_and_follow_the_origin(prompt: tuple[int, ...], rest: list[Span]) -> None:
    t = Transcript([Span("prompt", prompt), *rest])
    columns = (t.ids, t.action_mask, t.demo_mask, t.logprobs, t.turns, t.kinds)
    assert {len(c) for c in columns} == {len(t)} == {len(prompt) + sum(map(len, rest))}
    flat = [(s, i) for s in t.spans for i in range(len(s))]
    for at, (span, i) in enumerate(flat):
        assert t.ids[at] == span.ids[i]
        assert t.action_mask[at] == (span.origin == "policy")
        assert t.demo_mask[at] == (span.origin == "demo" and span.kind != "observation")
        assert t.logprobs[at] == (span.logprobs[i] if span.logprobs else 0.0)
        in_code = span.code is not None and span.code[0] <= i < span.code[1]
        assert KINDS[t.kinds[at]] == ("code" if in_code else span.kind)
    assert t.n_action == sum(t.action_mask)


def test_a_transcript_starts_with_its_prompt_once() -> None:
    with pytest.raises(LedgerError, match="starts with its prompt"):
        Transcript([Span("tool", (1,))])
    with pytest.raises(LedgerError, match="first and once"):
        Transcript([Span("prompt", (1,)), Span("prompt", (2,))])
    with pytest.raises(LedgerError, match="turn 0 after turn 1"):
        Transcript([Span("prompt", (1,)), Span("tool", (1,), turn=1), Span("tool", (1,), turn=0)])


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"origin": "policy", "ids": (1, 2)}, "one log-prob per id"),
        ({"origin": "policy", "ids": (1, 2), "logprobs": (-1.0,), "versions": ((0, 0),)}, "one log-prob per id"),
        ({"origin": "policy", "ids": (1,), "logprobs": (float("nan"),), "versions": ((0, 0),)}, "not finite"),
        ({"origin": "policy", "ids": (1,), "logprobs": (-1.0,)}, "versions must start"),
        ({"origin": "policy", "ids": (1, 2), "logprobs": (-1.0, -1.0), "versions": ((0, 0), (0, 1))}, "versions must"),
        ({"origin": "tool", "ids": (1,), "logprobs": (-1.0,)}, "was not sampled"),
        ({"origin": "tool", "ids": (1,), "code": (0, 2)}, "outside the span"),
        ({"origin": "nobody", "ids": (1,)}, "unknown origin"),
        ({"origin": "tool", "ids": (1,), "turn": -1}, "turn must be"),
    ],
)
def test_a_span_that_would_lie_is_refused(kwargs: dict, message: str) -> None:
    with pytest.raises(LedgerError, match=message):
        Span(**kwargs)


def test_a_sample_is_a_view_after_the_first_token() -> None:
    t = Transcript([Span("prompt", (1, 2)), Span("tool", (3, 4, 5))])
    assert Sample.whole(t).train == (2, 5)
    for bad in ((0, 3), (3, 2), (2, 6)):
        with pytest.raises(LedgerError, match="outside"):
            Sample(t, bad)


@given(tokens=ids, data=st.data())
def test_the_digest_sees_every_id_and_logprob(tokens: tuple[int, ...], data: st.DataObject) -> None:
    logprobs = [-0.5] * len(tokens)
    at = data.draw(st.integers(0, len(tokens) - 1))
    other_ids = [*tokens[:at], tokens[at] + 1, *tokens[at + 1 :]]
    other_logprobs = [*logprobs[:at], -0.5001, *logprobs[at + 1 :]]
    digests = {
        digest_tokens(tokens, logprobs),
        digest_tokens(other_ids, logprobs),
        digest_tokens(tokens, other_logprobs),
    }
    assert len(digests) == 3
