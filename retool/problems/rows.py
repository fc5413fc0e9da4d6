"""Rows of files and hub data sets, and how a row becomes a problem."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from retool.config import ProblemsConfig
from retool.errors import UserError
from retool.records import Problem

_LONGEST_META = 500  # characters of a row's other fields that are worth carrying along
TESTS = ("input_output", "private_tests", "generated_tests", "public_tests")  # columns of code problems, kept whole

_FIX = "correct or remove the row, or set problems.skip_bad"

Row = tuple[str, Mapping[str, Any], str]  # where it stands, the row, its identity in the set


class ProblemError(UserError):
    """A problem set that cannot be used: says which file and row, and what to do."""


class BadRow(ProblemError):
    """One row without a usable question or answer; `problems.skip_bad` leaves such rows out."""


def read_rows(config: ProblemsConfig) -> Iterator[Row]:
    """Rows of a jsonl or parquet file, or of a hub data set. Raises `ProblemError`."""
    if not config.path:
        raise ProblemError(f"problems.path is missing; kind {config.kind!r} needs a file or a data set name")
    if config.kind == "hf":
        return _hub(config)
    path = Path(config.path).expanduser()
    if not path.is_file():
        raise ProblemError(f"problems.path: there is no file {config.path}; check the path (relative to {Path.cwd()})")
    return _jsonl(path) if config.kind == "jsonl" else _parquet(path)


def _jsonl(path: Path) -> Iterator[Row]:
    try:
        with path.open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                where = f"{path}, line {number}"
                try:
                    row = json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise ProblemError(f"{where}: not JSON ({error}); every line must hold one object") from error
                if not isinstance(row, dict):
                    raise ProblemError(f"{where}: a {type(row).__name__}, not an object; every line must hold one")
                yield where, row, f"{path.stem}:{number}"
    except UnicodeDecodeError as error:
        raise ProblemError(f"{path}: not UTF-8 text ({error}); is it a parquet file? set problems.kind") from error
    except OSError as error:
        raise ProblemError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error


def _parquet(path: Path) -> Iterator[Row]:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise ProblemError("parquet files need pyarrow; pip install 'retool-rl[train]'") from error
    try:
        with pq.ParquetFile(path) as file:
            number = 0
            for batch in file.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", row, f"{path.stem}:{number}"
    except (pa.ArrowException, OSError) as error:
        raise ProblemError(f"{path}: not a readable parquet file ({error})") from error


def _hub(config: ProblemsConfig) -> Iterator[Row]:
    name = f"{config.path}, split {config.split!r}"
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ProblemError("hub data sets need the datasets library; pip install 'retool-rl[data]'") from error
    try:
        rows = load_dataset(config.path, config.subset, split=config.split)
    except Exception as error:  # the library raises many kinds: offline, no such set, no such split, ...
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ProblemError(f"hub data set {name}: {reason[0]}; check name, subset, split and network") from error
    for number, row in enumerate(rows, 1):
        yield f"hub data set {name}, row {number}", row, f"{config.path}:{config.split}:{number}"


def to_problem(config: ProblemsConfig, where: str, row: Mapping[str, Any], identity: str) -> Problem:
    """Raises `ProblemError` for a missing field, an empty question, or no answer."""
    prompt = _field(row, config.prompt_field, "prompt_field", where)
    tests = {k: _plain(row[k]) for k in TESTS if row.get(k) is not None}
    if tests and config.answer_field not in row:  # a program has no reference, only tests
        return Problem(
            identity,
            prompt,
            "",
            source=str(config.path),
            family=Path(str(config.path)).stem,
            meta=_meta(config, row, tests),
        )
    whole = _field(row, config.answer_field, "answer_field", where)
    answer = whole
    if config.answer_pattern is not None:
        match = _pattern(config.answer_pattern).search(whole)
        if match is None or not (match.group(1) or "").strip():
            raise BadRow(
                f"{where}: problems.answer_pattern {config.answer_pattern!r} finds no answer in {whole[-60:]!r}; "
                "correct the pattern, remove the row, or set problems.skip_bad"
            )
        answer = match.group(1).strip()
    meta = _meta(config, row, tests)
    if answer != whole:
        meta["teacher"] = {"solution": whole}
    return Problem(identity, prompt, answer, source=str(config.path), family=Path(str(config.path)).stem, meta=meta)


def _field(row: Mapping[str, Any], name: str, key: str, where: str) -> str:
    if name not in row:
        near = difflib.get_close_matches(name, row, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(map(str, row)) or 'no fields'}"
        raise ProblemError(f"{where}: no field {name!r} (problems.{key}); {hint}")
    value = row[name]
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        kind = "empty" if value is None else f"a {type(value).__name__}"
        raise BadRow(f"{where}: field {name!r} is {kind}, not text or a number; {_FIX}")
    text = str(value).strip()
    if not text:
        raise BadRow(f"{where}: field {name!r} is empty; {_FIX}")
    return text


def _pattern(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ProblemError(f"problems.answer_pattern {pattern!r} is no regular expression: {error}") from error
    if compiled.groups < 1:
        raise ProblemError(f"problems.answer_pattern {pattern!r} has no group; put the answer in parentheses")
    return compiled


def _meta(config: ProblemsConfig, row: Mapping[str, Any], tests: dict[str, Any]) -> dict[str, Any]:
    named = (config.prompt_field, config.answer_field)
    return {k: v for k, v in row.items() if k not in named and k not in tests and _small(v)} | tests


def _plain(value: Any) -> Any:
    """Lists and dictionaries of a row as what JSON has; parquet and hub sets bring arrays."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, str | int | float | None):
        return value
    return [_plain(v) for v in value]


def _small(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= _LONGEST_META)
