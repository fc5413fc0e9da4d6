"""Native tool calls, token by token: what the codec stitches is what the chat template renders; untrusted text stays
text in every frame; a template without a frame is refused before anything is trained."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from retool.config import ProtocolConfig
from retool.engines.base import Sampling
from retool.engines.scripted import ScriptedEngine
from retool.protocols import Call, Codec, CodecError, build_protocol
from retool.protocols.hermes import SCHEMA
from retool.protocols.template import render, result_message
from retool.records import Problem
from retool.rollout.episode import FORGED, Episode, EpisodeSettings
from tests.data_gen.runner import ProcessRunner
from tests.protocols.conftest import bpe_tokenizer
from tests.protocols.families import FAMILIES, family_tokenizer
from tests.protocols.test_templates import EXPECTED

NATIVE = [n for n, verdicts in EXPECTED.items() if verdicts.endswith("K")]
HERMES = ProtocolConfig(name="hermes")
FENCED = ProtocolConfig(name="fenced")
PROBLEM = Problem("p", "What is 6*7?", "42")
_SETTINGS = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def codec_of(name: str, config: ProtocolConfig = HERMES) -> Codec:
    return Codec(family_tokenizer(name), build_protocol(config))


def thought(name: str) -> str:
    return "So by program.\n</think>\n\n" if name == "qwen3_thinking" else ""


@pytest.mark.parametrize("name", NATIVE)
def test_the_stitched_ids_are_those_of_the_rendered_conversation(name: str) -> None:
    codec = codec_of(name)
    protocol, tokenizer = codec.protocol, codec.tokenizer
    said = [f"{thought(name)}I compute. {protocol.render_call(c)}" for c in ("print(6*7)", "print('\"a\\\\b\"')")]
    results = ['42\nand "more"', '"a\\b"']
    ids = list(codec.prompt_ids(PROBLEM))
    messages: list[dict[str, Any]] = [{"role": "user", "content": protocol.user_message(PROBLEM.prompt)}]
    assert codec.decode(ids) == render(tokenizer, messages, [SCHEMA])
    opened = "<think>\n" if name == "qwen3_thinking" else ""
    for i in range(2):
        ids += codec.demo_ids(said[i])
        ids += codec.observation_ids(results[i], ids)
        messages += [{"role": "assistant", "content": opened + said[i]}, result_message(results[i], i)]
        rendered = render(tokenizer, messages, [SCHEMA])
        assert codec.decode(ids) == rendered
        again = tokenizer.encode(rendered, add_special_tokens=False)
        assert [i for i in ids if i in codec.control_ids] == [i for i in again if i in codec.control_ids]


@pytest.mark.parametrize("name", NATIVE)
async def test_an_episode_appends_only_and_trains_on_what_was_sampled(name: str) -> None:
    codec = codec_of(name)
    turns = [f"{thought(name)}{codec.protocol.render_call('print(6*7)')}", f"{thought(name)}It is $\\boxed{{42}}$."]
    engine = ScriptedEngine(codec.tokenizer, lambda prompt, turn, text: turns[turn])
    limits = EpisodeSettings(max_turns=3, max_tokens=2000, sampling=Sampling(2000, stop=codec.protocol.stop))
    episode = Episode.start(
        engine, ProcessRunner(), codec, limits, Counter(), id="a", problem=PROBLEM, group="g", index=0, seed=0
    )
    played = await episode.run()
    assert played.status == "finished" and FORGED not in played.flags
    assert [c.observation for c in played.tool_calls] == ["42"]
    assert [s.origin for s in played.transcript.spans] == ["prompt", "policy", "tool", "policy"]
    assert codec.protocol.candidates(played.policy_text) == ["42"]
    assert codec.protocol.frame.opening in codec.decode(played.transcript.ids)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [n for n in FAMILIES if n not in NATIVE])
def test_a_template_without_a_frame_is_refused_by_name(name: str) -> None:
    with pytest.raises(CodecError, match="check-template") as refusal:
        codec_of(name)
    assert "protocol.name" in str(refusal.value)
    assert codec_of(name, FENCED).prompt_ids(PROBLEM)


@pytest.mark.parametrize(
    ("result", "reason"),
    [
        ("{{ m.content if loop.index0 < 3 else m.content | upper }}", "second result differently"),
        ("{{ m.content if loop.index0 > messages | length - 2 else 'cleared' }}", "earlier turns"),
        ("{{ m.content | replace('a result', 'the result') }}", "not as it is"),
        ("{{ m.content }}{{ m.content }}", "not as it is"),
    ],
    ids=["second", "cleared", "rewritten", "twice"],
)
def test_templates_that_play_with_results_are_refused(result: str, reason: str) -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'tool' %}RESULT{% else %}{{ m.content }}"
        "{% endif %}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    assert Codec(bpe_tokenizer(template.replace("RESULT", "{{ m.content }}")), build_protocol(HERMES))
    with pytest.raises(CodecError, match=reason):
        Codec(bpe_tokenizer(template.replace("RESULT", result)), build_protocol(HERMES))


def hostile(codec: Codec) -> Any:
    strings = [*codec.protocol.control, *codec.tokenizer.all_special_tokens, "```", "\\", '"', "<", "|", "\n", "\ud800"]
    return st.lists(st.sampled_from(strings) | st.text(max_size=3), max_size=10).map("".join)


@pytest.mark.parametrize("config", [HERMES, FENCED], ids=["hermes", "fenced"])
@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama3", "granite3", "phi4_mini"])
@_SETTINGS
@given(data=st.data())
def test_hostile_text_never_becomes_control(name: str, config: ProtocolConfig, data: st.DataObject) -> None:
    codec = codec_of(name, config)
    text = data.draw(hostile(codec))
    anchor = codec.demo_ids(codec.protocol.render_call("print(1)"))
    for plain, ids in (
        (codec.observation_ids("x", anchor), codec.observation_ids(text, anchor)),
        (codec.prompt_ids(PROBLEM), codec.prompt_ids(Problem("p", text, "0"))),
    ):
        assert [i for i in ids if i in codec.control_ids] == [i for i in plain if i in codec.control_ids]
        shown, expected = codec.decode(ids), codec.decode(plain)
        for mark in codec.protocol.control:
            assert shown.count(mark) == expected.count(mark), mark


@_SETTINGS
@given(before=st.text(alphabet="ab`\n ", max_size=9))
@example(before="")
def test_a_result_in_fences_starts_on_its_own_line(before: str) -> None:
    codec = Codec(bpe_tokenizer(), build_protocol(FENCED))
    ids = list(codec.demo_ids(f"{before}{codec.protocol.render_call('print(1)')}"))
    ids += codec.observation_ids("```\nx", ids)
    text = codec.decode(ids)
    assert text.endswith("\n```\n```output\n`\\``\nx\n```\n")
    assert isinstance(codec.protocol.parse(codec.protocol.render_call("print(1)")), Call)


@pytest.mark.parametrize("config", [HERMES, FENCED], ids=["hermes", "fenced"])
def test_without_the_tool_the_opener_is_banned_and_nothing_stops(config: ProtocolConfig) -> None:
    from retool.config import Recipe

    codec = codec_of("qwen3", config)
    limits = EpisodeSettings.of(Recipe(), codec, tool=False)
    assert limits.sampling.stop == () and codec.protocol.call_open in limits.sampling.banned
    assert EpisodeSettings.of(Recipe(), codec, tool=True).sampling.stop == codec.protocol.stop


@pytest.mark.parametrize("name", ["qwen3", "llama3"])
async def test_a_forged_result_is_flagged(name: str) -> None:
    codec = codec_of(name)
    frame = codec.protocol.frame  # type: ignore[attr-defined]
    said = f"so {frame.opening.partition('>')[2]}\\boxed{{42}}"
    engine = ScriptedEngine(codec.tokenizer, lambda prompt, turn, text: said)
    limits = EpisodeSettings(max_turns=2, max_tokens=2000, sampling=Sampling(2000, stop=codec.protocol.stop))
    episode = Episode.start(
        engine, ProcessRunner(), codec, limits, Counter(), id="a", problem=PROBLEM, group="g", index=0, seed=0
    )
    played = await episode.run()
    assert FORGED in played.flags
    assert codec.protocol.candidates(codec.protocol.strip_forged(played.policy_text)) == []
