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
DISPLAYS_MAX, REPRESENTATIONS_MAX = 8, 8
"""Rich results of one execution, and representations of one result."""
RESULT_BYTES = 1024 * 1024
"""What the representations of one result may weigh together (see `weight`)."""
DISPLAY_BYTES = DISPLAYS_MAX * RESULT_BYTES
"""The most data that rich results have."""
KIND_MAX = 64
"""Characters of a MIME type."""
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


_CONTROLS = bytes({*range(32), 127} - set(b"\t\n\r"))


def weight(text: bytes) -> int:
    """Its bytes; a control character counts as the six that JSON makes of it, so that an answer is never too large."""
    return len(text) + 5 * (len(text) - len(text.translate(None, _CONTROLS)))


_REPRESENTATIONS = (
    ("text/html", "_repr_html_"),
    ("image/svg+xml", "_repr_svg_"),
    ("image/png", "_repr_png_"),
    ("text/latex", "_repr_latex_"),
)


def _represent(value: Any) -> dict[str, bytes]:
    """MIME type -> text (binary as base64). A representation that fails or is too large is left out."""
    found: dict[str, bytes] = {}
    room = RESULT_BYTES
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
                data = str.encode(text, "utf-8", "replace")
                if weight(data) <= room:
                    found[kind] = data
                    room -= weight(data)
        except Exception:
            continue
    return found


def _figures() -> list[dict[str, bytes]]:
    """Open matplotlib figures, when the code has imported it; they are closed."""
    pyplot = sys.modules.get("matplotlib.pyplot")
    if pyplot is None:
        return []
    images = []
    try:
        for number in pyplot.get_fignums()[:DISPLAYS_MAX]:
            buffer = io.BytesIO()
            pyplot.figure(number).savefig(buffer, format="png")
            if buffer.tell() <= RESULT_BYTES * 3 // 4:
                images.append({"image/png": base64.b64encode(buffer.getvalue())})
        pyplot.close("all")
    except Exception:
        pass
    return images


def rich_results(shown: list[Any]) -> list[dict[str, bytes]]:
    """Representations of the last expression's value and of the figures; an interrupt passes, no error is raised."""
    results = [found for value in shown if (found := _represent(value))]
    return (results + _figures())[:DISPLAYS_MAX]


def packed(results: list[dict[str, bytes]]) -> tuple[list[list[tuple[str, int]]], bytes]:
    """As a frame carries them: for each result the MIME types and sizes of its texts, and all texts as data."""
    table = [[(kind, len(text)) for kind, text in found.items()] for found in results]
    return table, b"".join(text for found in results for text in found.values())


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
        name = _clip(str(type(error).__name__))
        if isinstance(error, MemoryError):
            error.__context__ = error.__cause__ = None
        shown = traceback.TracebackException.from_exception(error, limit=-_FRAMES_MAX, compact=True)
        _only_user_frames(shown, set())
        return {"type": name, "message": _clip(str(error)), "traceback": _clip("".join(shown.format()))}
    except BaseException:
        return {"type": name, "message": "", "traceback": f"{name}\n"}
