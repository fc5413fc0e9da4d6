"""Traces in every format: generated in one, trained on in another."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations
from pathlib import Path

import pytest

from data_gen import DataError, Segment, Trace, generate, load_traces, trace_to_transcript
from data_gen.translate import TranslationError, translated
from retool.config import DataConfig, ProblemsConfig, ProtocolConfig, Recipe
from retool.protocols import Codec, build_protocol
from tests.data_gen.runner import ProcessRunner
from tests.protocols.families import family_tokenizer

FORMATS = {
    "tags": ProtocolConfig(),
    "raw tags": ProtocolConfig(fence=False, boxed=False, instructions=""),
    "hermes": ProtocolConfig(name="hermes"),
    "fenced": ProtocolConfig(name="fenced"),
    "unboxed": ProtocolConfig(name="fenced", boxed=False),
}


def codec_of(name: str) -> Codec:
    return Codec(family_tokenizer("qwen2_5"), build_protocol(FORMATS[name]))


async def traces_of(name: str, folder: Path) -> list[Trace]:
    config = Recipe(
        data=DataConfig(problems=ProblemsConfig(families=("product", "last"), count=6), tool_share=0.6),
        protocol=FORMATS[name],
        reward={"verifier": "exact"},  # type: ignore[arg-type]
    )
    report = await generate(config, ProcessRunner(), codec_of(name), folder / f"{name}.jsonl")
    assert report.rejected == {} and 0 < report.tool_traces < 6
    return load_traces(folder / f"{name}.jsonl")


@pytest.mark.parametrize(("source", "target"), list(permutations(FORMATS, 2)), ids="-".join)
async def test_a_translated_trace_is_the_generated_one(source: str, target: str, tmp_path: Path) -> None:
    there, here = codec_of(source), codec_of(target)
    wanted = await traces_of(target, tmp_path)
    for trace, want in zip(await traces_of(source, tmp_path), wanted, strict=True):
        got = translated(trace, here.protocol)
        assert got.segments == want.segments
        assert here.protocol.check(got.rendered(here.protocol, here.escape)) == []
        assert trace_to_transcript(trace, here).ids == trace_to_transcript(want, here).ids
        assert translated(trace, there.protocol) is trace


async def test_what_cannot_be_translated_is_refused(tmp_path: Path) -> None:
    trace = next(t for t in await traces_of("tags", tmp_path) if t.tool_calls)
    fenced = codec_of("fenced")
    first, seen, last = trace.segments
    for segments, reason in (
        ((replace(first, text="well"), seen, last), "without a tags call"),
        ((first, seen, replace(last, text="so 4")), "does not end with an answer"),
        ((replace(first, text="<code>\n```python\nprint('''\n```\n''')\n```\n</code>"), seen, last), "own marks"),
    ):
        with pytest.raises(TranslationError, match=reason):
            translated(replace(trace, segments=segments), fenced.protocol)
    with pytest.raises(TranslationError, match="protocol cannot be read"):
        translated(replace(trace, protocol={"name": "xml"}), fenced.protocol)


async def test_a_trace_that_does_not_say_its_format_must_be_in_the_recipe_s(tmp_path: Path) -> None:
    trace = next(t for t in await traces_of("tags", tmp_path) if t.tool_calls)
    silent = replace(trace, protocol=None)
    assert trace_to_transcript(silent, codec_of("tags")).ids
    with pytest.raises(DataError, match=r"protocol\.name=hermes"):
        trace_to_transcript(silent, codec_of("hermes"))
    plain = Trace("t", trace.problem, (Segment("demo", "4"),), 0, "f")
    assert trace_to_transcript(plain, codec_of("hermes")).ids
