"""Executing source as a REPL would: the last expression is shown; tracebacks show user frames."""

from __future__ import annotations

import ast
import base64
import io
import linecache
import sys
import traceback
from typing import Any, Protocol

MAIN = "main.py"
"""File name of the user's code in tracebacks."""
_CELL = "cell "
_CELLS_KEPT = 100  # sources of so many past cells stay known, for tracebacks through their functions
_DISPLAY_MAX = 1024 * 1024  # characters of one rich result, of all representations of it
_DISPLAYS_MAX = 8
DISPLAY_BYTES = 6 * _DISPLAYS_MAX * _DISPLAY_MAX  # as JSON, where a character may take six bytes
"""Largest report of rich results."""
_TEXT_MAX = 12_000
_FRAMES_MAX = 1_100  # the innermost; enough for the default recursion limit


class Written(Protocol):
    """Something that counts the bytes written to standard output."""

    written: int


def cell_name(number: int) -> str:
    """File name of a session's cell in tracebacks."""
    return f"{_CELL}{number}"


def run_source(
    source: str, names: dict[str, Any], stdout: Written, name: str = MAIN, shown: list[Any] | None = None
) -> None:
    """Execute `source` in `names`; when it ends with an expression and has printed nothing, print its repr.

    `shown`: takes the value of that expression instead, for `rich_results`. Raises whatever the code raises,
    `SyntaxError` included.
    """
    linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
    if name != MAIN:
        linecache.cache.pop(cell_name(int(name[len(_CELL) :]) - _CELLS_KEPT), None)
    tree = ast.parse(source, name)
    last: ast.expr | None = None
    if tree.body and isinstance(tree.body[-1], ast.Expr):
        last = tree.body.pop().value  # type: ignore[attr-defined]
    if tree.body:
        exec(compile(tree, name, "exec"), names)
    if last is None:
        return
    value = eval(compile(ast.Expression(last), name, "eval"), names)
    if value is None:
        return
    if shown is not None:
        shown.append(value)
        return
    sys.stdout.flush()
    if stdout.written == 0:
        print(repr(value))


_REPRESENTATIONS = (
    ("text/html", "_repr_html_"),
    ("image/svg+xml", "_repr_svg_"),
    ("image/png", "_repr_png_"),
    ("text/latex", "_repr_latex_"),
)


def _represent(value: Any) -> dict[str, str]:
    """MIME type -> text (binary as base64). A representation that fails or is too large is left out."""
    found: dict[str, str] = {}
    room = _DISPLAY_MAX
    for kind, name in (("text/plain", "__repr__"), *_REPRESENTATIONS):
        try:
            method = getattr(type(value), name, None)
            text = method(value) if method is not None and not isinstance(value, type) else None
            if kind == "text/plain" and text is None:
                text = repr(value)
            if isinstance(text, bytes):
                text = base64.b64encode(text).decode()
            if kind == "text/plain" and isinstance(text, str):
                text = _clip(text)
            if isinstance(text, str) and len(text) <= room:
                found[kind] = text
                room -= len(text)
        except Exception:
            continue
    return found


def _figures() -> list[dict[str, str]]:
    """Open matplotlib figures, when the code has imported it; they are closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    images = []
    try:
        for number in pyplot.get_fignums()[:_DISPLAYS_MAX]:
            buffer = io.BytesIO()
            pyplot.figure(number).savefig(buffer, format="png")
            if buffer.tell() <= _DISPLAY_MAX * 3 // 4:
                images.append({"image/png": base64.b64encode(buffer.getvalue()).decode()})
        pyplot.close("all")
    except Exception:
        pass
    return images


def rich_results(shown: list[Any]) -> list[dict[str, str]]:
    """Representations of the last expression's value and of the figures; an interrupt passes, no error is raised."""
    results = [found for value in shown if (found := _represent(value))]
    return (results + _figures())[:_DISPLAYS_MAX]


def _only_user_frames(error: traceback.TracebackException, seen: set[int]) -> None:
    if id(error) in seen:
        return
    seen.add(id(error))
    error.stack = traceback.StackSummary.from_list(
        [f for f in error.stack if f.filename == MAIN or f.filename.startswith(_CELL)]
    )
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
