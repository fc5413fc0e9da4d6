"""Names of files in a work folder, as callers give them: what is accepted, and how much of it."""

from __future__ import annotations

from collections.abc import Iterable

MAX_ENTRIES = 1_000
"""Files of one request."""
MAX_BYTES = 16 * 1024 * 1024
"""Bytes of all files of one request."""
BRANCHES = ".branches"
"""In a session's folder: where the folders of its branches lie. Not for callers."""
_MAX_PATH, _MAX_NAME = 4096, 255


def refusal(path: str) -> str:
    """Why `path` is no name of a file inside a work folder; empty when it is one."""
    try:
        data = path.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return f"path {path!r} is not text"
    shown = repr(path if len(path) <= 80 else path[:80] + "...")
    if not path:
        return "the path is empty"
    if "\0" in path:
        return f"path {shown} holds a NUL"
    if path.startswith("/"):
        return f"path {shown} is absolute: give it relative to the work folder"
    if len(data) > _MAX_PATH:
        return f"path {shown} has {len(data)} bytes; at most {_MAX_PATH}"
    for number, part in enumerate(path.split("/")):
        if part in ("", ".", ".."):
            return f"path {shown} has the component {part!r}, which is not allowed"
        if len(part.encode("utf-8", "surrogateescape")) > _MAX_NAME:
            return f"path {shown} has a component of more than {_MAX_NAME} bytes"
        if number == 0 and part == BRANCHES:
            return f"path {shown} is reserved"
    return ""


def refusals(paths: Iterable[str]) -> str:
    """The first refusal, too many entries included; empty when all are fine."""
    for count, path in enumerate(paths):
        if count >= MAX_ENTRIES:
            return f"more than {MAX_ENTRIES} files"
        if reason := refusal(path):
            return reason
    return ""
