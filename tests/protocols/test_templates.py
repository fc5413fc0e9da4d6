"""Chat templates of a dozen families: which conversations keep their prefix, and where the others break."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from retool.cli import app
from retool.errors import UserError
from retool.protocols import CodecError
from retool.protocols.prefix import TemplateReport, check_template
from retool.protocols.template import render
from retool.template_command import run_check
from tests.protocols.families import FAMILIES, TEMPLATES, family_tokenizer

CASES = ("text", "text, thinking", "tool calls", "tool calls, thinking", "hermes")
SHORT = {"kept": "K", "broken": "B", "unsupported": "-"}
EXPECTED = {  # in the order of CASES
    "smollm2": "KK--K",
    "qwen2_5": "KKKKK",
    "qwen3": "KBKKK",
    "qwen3_thinking": "-B-KK",
    "llama3": "KKBBK",
    "mistral": "BBBBB",
    "gemma2": "KK---",
    "deepseek_r1": "-B-BB",
    "phi3": "KK---",
    "phi4_mini": "KK--K",
    "granite3": "KK--K",
    "glm4_5": "BBBKB",
}


def report_of(name: str) -> TemplateReport:
    return check_template(family_tokenizer(name))


def case_of(name: str, case: str) -> Any:
    return next(c for c in report_of(name).cases if c.name == case)


def test_every_family_has_an_expectation() -> None:
    assert set(EXPECTED) == set(FAMILIES) == {p.stem for p in TEMPLATES.glob("*.jinja")}


@pytest.mark.parametrize("name", EXPECTED)
def test_verdicts(name: str) -> None:
    report = report_of(name)
    assert tuple(c.name for c in report.cases) == CASES
    assert "".join(SHORT[c.verdict] for c in report.cases) == EXPECTED[name]
    assert report.kept == ("B" not in EXPECTED[name])
    assert report.protocols["tags"] == report.protocols["fenced"] == ""
    assert (report.protocols["hermes"] == "") == EXPECTED[name].endswith("K") == (report.frame is not None)
    for case in report.cases:
        assert bool(case.why) == (case.verdict != "kept"), case
        assert (case.difference is not None) == (case.verdict == "broken"), case
    json.dumps(report.to_row())


@pytest.mark.parametrize("name", [n for n, verdicts in EXPECTED.items() if "B" in verdicts])
def test_the_difference_is_the_first_one(name: str) -> None:
    """Everything before it is equal: decoding the expected ids up to it gives the start of both texts."""
    for case in report_of(name).cases:
        if (d := case.difference) is not None:
            assert d.expected_id != d.found_id
            assert d.token >= 0 and d.turn in (1, 2)


def test_where_thinking_is_lost() -> None:
    for name in ("qwen3", "deepseek_r1"):
        case = case_of(name, "text, thinking")
        assert case.why == "earlier thinking is dropped"
        assert case.difference.turn == 1
    d = case_of("qwen3", "text, thinking").difference
    assert (d.expected, d.before.endswith("<|im_start|>assistant\n")) == ("<think>", True)
    assert d.found != "<think>"
    assert "thinking" in report_of("deepseek_r1").protocols["hermes"]


def test_where_a_call_takes_the_text_with_it() -> None:
    d = case_of("llama3", "tool calls").difference
    assert d.before.endswith("<|start_header_id|>assistant<|end_header_id|>\n\n")
    assert d.expected.startswith("L") and d.found.startswith("{")


def test_where_a_space_is_added() -> None:
    d = case_of("mistral", "text").difference
    assert d.before.endswith("[/INST]")
    assert not d.expected.startswith(" ") and d.found.startswith(" ")


def test_what_a_template_says_about_tools() -> None:
    assert {n for n in FAMILIES if report_of(n).declares_tools} == {
        "qwen2_5",
        "qwen3",
        "qwen3_thinking",
        "phi4_mini",
        "granite3",
    }
    assert {n for n in FAMILIES if report_of(n).opens_thinking} == {"qwen3_thinking", "deepseek_r1"}
    assert report_of("llama3").frame.json and not report_of("qwen3").frame.json  # type: ignore[union-attr]
    assert "roles must alternate" in report_of("gemma2").protocols["hermes"]
    assert "result of a tool" in report_of("phi3").protocols["hermes"]


def test_an_absent_user_message_makes_every_protocol_unusable() -> None:
    report = check_template(with_template("smollm2", "{{ '<|im_start|>assistant\n' }}"))
    assert all(report.protocols.values())
    assert not report.kept


def test_a_merge_over_the_end_of_a_turn_is_found() -> None:
    """The text is kept, but its full stop and the line break behind it are one token of this tokenizer."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    tok.train_from_iterator([".\n"] * 9, trainer)
    template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}{{ 'assistant: ' }}"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tok, chat_template=template)
    case = next(c for c in check_template(tokenizer).cases if c.name == "text")
    assert case.verdict == "broken" and "merges" in case.why
    assert (case.difference.expected, case.difference.found) == (".", ".\n")  # type: ignore[union-attr]


def with_template(family: str, template: str) -> Any:
    import copy

    tokenizer = copy.deepcopy(family_tokenizer(family))
    tokenizer.chat_template = template
    return tokenizer


def test_a_broken_template_is_named() -> None:
    with pytest.raises(CodecError, match="refuses this conversation"):
        render(with_template("smollm2", "{{ raise_exception('no') }}"), [{"role": "user", "content": "x"}], None)


@pytest.mark.parametrize(("name", "code"), [("qwen2_5", 0), ("qwen3", 1)])
def test_the_command(name: str, code: int, tmp_path: Path) -> None:
    family_tokenizer(name).save_pretrained(tmp_path / "model")
    done = CliRunner().invoke(app, ["check-template", str(tmp_path / "model"), "--json"])
    assert done.exit_code == code, done.output
    told = json.loads(done.stdout)
    assert told["kept"] == (code == 0)
    assert told["protocols"]["hermes"] == {"usable": True, "why": ""}
    assert len(told["cases"]) == len(CASES)
    assert run_check(str(tmp_path / "model"), None, "hermes", as_json=True) == 0
    gemma = TEMPLATES / "gemma2.jinja"
    assert run_check(str(tmp_path / "model"), gemma, None, as_json=True) == 0
    assert run_check(str(tmp_path / "model"), gemma, "hermes", as_json=True) == 1


def test_the_command_prints_the_place(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    family_tokenizer("qwen3").save_pretrained(tmp_path / "model")
    assert run_check(str(tmp_path / "model"), None, None, as_json=False) == 1
    out = capsys.readouterr().out
    assert "earlier thinking is dropped" in out
    assert "expected  '<think>'" in out
    assert "does not keep the exact prefix" in out


def test_what_cannot_be_checked_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no folder"):
        run_check("./nowhere", None, None, as_json=False)
    with pytest.raises(UserError, match="no tokenizer"):
        run_check(str(tmp_path), None, None, as_json=False)
    tokenizer = with_template("smollm2", "")
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match="no chat template"):
        run_check(str(tmp_path / "bare"), None, None, as_json=False)
    with pytest.raises(UserError, match="cannot be read"):
        run_check(str(tmp_path / "bare"), tmp_path / "none.jinja", None, as_json=False)
    with pytest.raises(UserError, match="choose one of tags"):
        run_check(str(tmp_path / "bare"), None, "xml", as_json=False)
