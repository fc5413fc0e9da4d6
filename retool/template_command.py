"""`retool check-template MODEL`: does its chat template keep the exact prefix over turns, and which protocols fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from retool.console import console, table
from retool.errors import UserError
from retool.protocols.build import PROTOCOLS
from retool.protocols.prefix import Case, TemplateReport, check_template


def run_check(model: str, template: Path | None, protocol: str | None, as_json: bool) -> int:
    """Prints the report; 0 when the prefix is kept (with `protocol`: when that one is usable), else 1. Raises
    `UserError`."""
    if protocol is not None and protocol not in PROTOCOLS:
        raise UserError(f"--protocol {protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    report = check_template(tokenizer_of(model, template))
    if as_json:
        row = {"model": model, "template": str(template) if template is not None else None, **report.to_row()}
        print(json.dumps(row, indent=1, ensure_ascii=False))
    else:
        print_report(model, report)
    good = report.kept if protocol is None else not report.protocols[protocol]
    return 0 if good else 1


def tokenizer_of(model: str, template: Path | None) -> Any:
    """A folder with tokenizer files (weights are not needed) or a hub name, with another template if one is given."""
    folder = Path(model).expanduser()
    if not folder.exists() and (model.startswith((".", "/", "~")) or model.count("/") != 1):
        raise UserError(
            f"there is no folder {model!r}; give a folder with tokenizer files, or a hub name like org/model"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder) if folder.exists() else model)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(f"no tokenizer can be loaded from {model!r}: {reason}") from error
    if template is not None:
        try:
            tokenizer.chat_template = template.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--template {template}: cannot be read ({error})") from error
    if not tokenizer.chat_template:
        raise UserError(f"the tokenizer of {model!r} has no chat template; give one with --template FILE.jinja")
    return tokenizer


def print_report(model: str, report: TemplateReport) -> None:
    """Tables of conversations and protocols, then every difference with its surroundings."""
    rows = [[c.name, c.verdict, c.why] for c in report.cases]
    console.print(table(f"{model}: earlier turns in later prompts", ["conversation", "prefix", "why"], rows))
    rows = [[name, "no" if why else "yes", why] for name, why in report.protocols.items()]
    console.print(table("protocols", ["protocol.name", "usable", "why not"], rows))
    for case in report.cases:
        _print_difference(case)
    said = "keeps" if report.kept else "does not keep"
    console.print(f"the chat template {said} the exact prefix over turns", markup=False)


def _print_difference(case: Case) -> None:
    d = case.difference
    if d is None:
        return
    console.print(f"{case.name}: turn {d.turn}, token {d.token}", markup=False, soft_wrap=True)
    console.print(f"  after     {d.before!r}", markup=False, soft_wrap=True)
    console.print(f"  expected  {d.expected!r} (id {d.expected_id})", markup=False, soft_wrap=True)
    found = "the end" if d.found_id is None else f"{d.found!r} (id {d.found_id})"
    console.print(f"  found     {found}", markup=False, soft_wrap=True)
