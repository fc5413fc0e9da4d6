"""Executing source as a REPL would: the last expression is shown; tracebacks show user frames."""

from __future__ import annotations

import ast
import linecache
import sys
import traceback
from typing import Any, Protocol

MAIN = "main.py"
"""File name of the user's code in tracebacks."""
_TEXT_MAX = 12_000
_FRAMES_MAX = 1_100  # the innermost; enough for the default recursion limit


class Written(Protocol):
    """Something that counts the bytes written to standard output."""

    written: int


def run_source(source: str, names: dict[str, Any], stdout: Written) -> None:
    """Execute `source` in `names`; when it ends with an expression and has printed nothing, print its repr.

    Raises whatever the code raises, `SyntaxError` included.
    """
    linecache.cache[MAIN] = (len(source), None, source.splitlines(keepends=True), MAIN)
    tree = ast.parse(source, MAIN)
    last: ast.expr | None = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = tree.body.pop().value  # type: ignore[attr-defined]
    exec(compile(tree, MAIN, "exec"), names)
    if last is None:
        return
    value = eval(compile(ast.Expression(last), MAIN, "eval"), names)
    if value is None:
        return
    sys.stdout.flush()
    if stdout.written == 0:
        print(repr(value))


def _only_user_frames(error: traceback.TracebackException, seen: set[int]) -> None:
    if id(error) in seen:
        return
    seen.add(id(error))
    error.stack = traceback.StackSummary.from_list([f for f in error.stack if f.filename == MAIN])
    for linked in (error.__cause__, error.__context__, *(getattr(error, "exceptions", None) or ())):
        if linked is not None:
            _only_user_frames(linked, seen)


def _clip(text: str) -> str:
    """Head and tail of a long text: the error itself stands at the end."""
    if len(text) <= _TEXT_MAX:
        return text
    half = _TEXT_MAX // 2
    return f"{text[:half]}\n... [{len(text) - _TEXT_MAX} characters omitted] ...\n{text[-half:]}"


def describe(error: BaseException) -> dict[str, str]:
    """Type, message and traceback of an exception. The exception's own methods may misbehave; this does not."""
    name = "Exception"
    try:
        name = str(type(error).__name__)
        if isinstance(error, MemoryError):
            error.__context__ = error.__cause__ = None
        shown = traceback.TracebackException.from_exception(error, limit=-_FRAMES_MAX, compact=True)
        _only_user_frames(shown, set())
        return {"type": name, "message": _clip(str(error)), "traceback": _clip("".join(shown.format()))}
    except BaseException:
        return {"type": name, "message": "", "traceback": f"{name}\n"}
