"""From a trace to a transcript: the ids that an episode would have made, and masks that train the teacher's turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from data_gen import DataError, Segment, Trace, load_traces, trace_to_transcript
from data_gen.trace import write_traces
from retool.config import ProtocolConfig
from retool.engines.base import Sampling
from retool.engines.scripted import ScriptedEngine
from retool.protocols import Codec, build_protocol
from retool.records import Problem
from retool.rollout.episode import Episode, EpisodeSettings
from retool.transcript import Sample
from tests.data_gen.runner import ProcessRunner
from tests.protocols.conftest import bpe_tokenizer, tiny_tokenizer

PROBLEM = Problem("p1", "What is 347*892?", "309524", "procedural", "product")


def codec_of(name: str) -> Codec:
    if name == "tiny":
        return Codec(tiny_tokenizer(), build_protocol(ProtocolConfig(fence=False, instructions="")))
    return Codec(bpe_tokenizer(), build_protocol(ProtocolConfig(instructions="")))


def trace_of(codec: Codec) -> Trace:
    turns = (
        Segment("demo", f"First. {codec.protocol.render_call('print(347*892)')}"),
        Segment("tool", "309524"),
        Segment("demo", f"Again. {codec.protocol.render_call('print(1)')}"),
        Segment("tool", "1"),
        Segment("demo", f"So {codec.protocol.render_answer('309524')}"),
    )
    return Trace("t1", PROBLEM, turns, 2, "product")


@pytest.mark.parametrize("name", ["tiny", "bpe"])
def test_masks_turns_and_code_ranges(name: str) -> None:
    codec = codec_of(name)
    transcript = trace_to_transcript(trace_of(codec), codec)
    assert [(s.origin, s.kind, s.turn) for s in transcript.spans] == [
        ("prompt", "text", 0),
        ("demo", "text", 0),
        ("tool", "observation", 0),
        ("demo", "text", 1),
        ("tool", "observation", 1),
        ("demo", "text", 2),
    ]
    trained = [i for i, m in zip(transcript.ids, transcript.demo_mask) if m]
    assert trained == [i for s in transcript.spans if s.origin == "demo" for i in s.ids]
    assert trained[-1] == codec.eos_id
    assert transcript.spans[1].ids[-1] != codec.eos_id
    for span, code in ((transcript.spans[1], "print(347*892)"), (transcript.spans[3], "print(1)")):
        assert span.code is not None
        marked = codec.decode(span.ids[span.code[0] : span.code[1]])
        assert code in marked
        assert marked.endswith("</code>")
        assert "." not in codec.decode(span.ids[: span.code[0]])[6:]
    assert transcript.spans[5].code is None
    assert sum(Sample.whole(transcript).transcript.demo_mask) == len(trained)


@pytest.mark.parametrize("name", ["tiny", "bpe"])
async def test_the_ids_are_those_of_an_episode(name: str) -> None:
    """A scripted policy says the same turns to the real episode: same ids, same spans, turn by turn."""
    codec = codec_of(name)
    trace = trace_of(codec)
    said = [s.text for s in trace.segments if s.origin == "demo"]
    engine = ScriptedEngine(codec.tokenizer, lambda prompt, turn, text: said[turn])
    settings = EpisodeSettings(max_turns=4, max_tokens=900, sampling=Sampling(900, stop=codec.protocol.stop))
    from collections import Counter

    episode = Episode.start(
        engine, ProcessRunner(), codec, settings, Counter(), id="0.0.0", problem=PROBLEM, group="0.0", index=0, seed=0
    )
    played = (await episode.run()).transcript
    shown = trace_to_transcript(trace, codec)
    assert played.ids == shown.ids
    assert [(len(s), s.turn, s.code) for s in played.spans] == [(len(s), s.turn, s.code) for s in shown.spans]
    assert played.action_mask == shown.demo_mask


def test_files_come_back_as_they_were_written(tmp_path: Path) -> None:
    traces = [trace_of(codec_of("tiny")), Trace("é", PROBLEM, (Segment("demo", "ü\u2028x"),), 0, "f")]
    write_traces(tmp_path / "t.jsonl", traces)
    assert load_traces(tmp_path / "t.jsonl") == traces


GOOD = {
    "id": "t",
    "problem": {"id": "p", "prompt": "q", "answer": "1", "source": "", "family": ""},
    "segments": [{"origin": "demo", "text": "x"}],
    "tool_calls": 0,
    "family": "",
}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{", "line 2: .*repair"),
        ("[]", "line 2: not a trace"),
        ({**GOOD, "segments": []}, "alternate"),
        ({**GOOD, "segments": [{"origin": "tool", "text": "x"}]}, "alternate"),
        ({**GOOD, "segments": [{"origin": "demo", "text": "x"}, {"origin": "tool", "text": "x"}]}, "alternate"),
        ({**GOOD, "segments": [{"origin": "demo"}]}, "not a trace"),
        ({k: v for k, v in GOOD.items() if k != "problem"}, "KeyError: 'problem'"),
    ],
)
def test_broken_files_are_refused_with_the_line(tmp_path: Path, row: Any, message: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + (row if isinstance(row, str) else json.dumps(row)) + "\n")
    with pytest.raises(DataError, match=message):
        load_traces(path)


def test_missing_and_empty_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="retool data generate"):
        load_traces(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="no traces"):
        load_traces(tmp_path / "empty.jsonl")
