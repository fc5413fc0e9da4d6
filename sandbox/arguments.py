"""What callers give, checked before anything is sent, the same for every kind of sandbox. Wrong arguments are the
caller's mistake: `ValueError`."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sandbox import paths
from sandbox.profiles import AUTO, PROFILES
from sandbox.types import Limits, SessionError

MAX_COPIES = 256
"""Sessions of one fork or restoration."""
MAX_TTL_S = 7 * 86_400.0
MAX_REQUEST = 32 * 1024 * 1024
"""Bytes that a server takes at once."""
_MAX_NAME = 128
_SEEDS = range(-(2**63), 2**63)
_LEAST = {"memory_mb": 16, "processes": 1, "output_kill_bytes": 1}
_WHOLE = (*_LEAST, "file_mb", "output_head_bytes", "output_tail_bytes", "code_bytes")


def check_profile_name(profile: str | None) -> None:
    """A profile that exists, installed or not."""
    if profile is not None and profile not in (AUTO, *PROFILES):
        raise ValueError(f"unknown profile {profile!r}: choose from {', '.join((AUTO, *PROFILES))}")


def check_counts(least: int = 0, **counts: int | None) -> None:
    """How many of something; None is the default."""
    for name, count in counts.items():
        if count is not None and (not isinstance(count, int) or count < least):
            raise ValueError(f"{name} must be a whole number, {least} or more, not {count!r}")


def check_limits(limits: Limits | None) -> None:
    """Limits that something can run in."""
    if limits is None:
        return
    if not isinstance(limits, Limits):
        raise ValueError(f"limits are `Limits`, not {type(limits).__name__}")
    for name in _WHOLE:
        value = getattr(limits, name)
        if not isinstance(value, int) or value < _LEAST.get(name, 0):
            raise ValueError(f"{name} must be a whole number, {_LEAST.get(name, 0)} or more, not {value!r}")
    if limits.wall_s <= 0 or limits.cpu_s <= 0:
        raise ValueError(f"wall_s and cpu_s must be more than 0, not {limits.wall_s!r} and {limits.cpu_s!r}")


def check_program(code: str, stdin: str, limits: Limits | None, files: Mapping[str, bytes] | None = None) -> None:
    """One execution: text, limits, and no more than a request can hold."""
    if not isinstance(code, str) or not isinstance(stdin, str):
        raise ValueError(f"code and stdin are text, not {type(code).__name__} and {type(stdin).__name__}")
    check_limits(limits)
    if files is not None and not isinstance(files, Mapping):
        raise ValueError(f"files are bytes by path, not {type(files).__name__}")
    data = 0
    for path, content in files.items() if files else ():
        if not isinstance(path, str) or not isinstance(content, bytes | bytearray | memoryview):
            raise ValueError(f"files are bytes by path, not {type(content).__name__} by {type(path).__name__}")
        data += 4 * len(content) // 3
    if 4 * (len(code) + len(stdin)) + data > MAX_REQUEST:  # few have to be counted
        check_size(sum(len(text.encode("utf-8", "surrogatepass")) for text in (code, stdin)) + data)


def check_size(size: int) -> None:
    """Of a request, or of what is to be in it."""
    if size > MAX_REQUEST:
        raise ValueError(f"{size} bytes of code, stdin and files; a request has at most {MAX_REQUEST}")


def check_options(
    seed: int, profile: str | None, key: str | None, fetch: Sequence[str] = (), deadline_s: float | None = None
) -> None:
    """What executions and sessions may be given besides."""
    if not isinstance(seed, int) or seed not in _SEEDS:
        raise ValueError(f"seed must be a whole number of 64 bits, not {seed!r:.100}")
    check_profile_name(profile)
    if key is not None and not isinstance(key, str):
        raise ValueError(f"idempotency_key is text, not {type(key).__name__}")
    if not _is_texts(fetch):
        raise ValueError(f"fetch is a list of paths, not {fetch!r:.100}")
    if deadline_s is not None and not (_is_number(deadline_s) and deadline_s < math.inf):
        raise ValueError(f"deadline_s must be a finite number of seconds, or None, not {deadline_s!r:.100}")


def check_lease(ttl_s: float) -> None:
    """The seconds that a session lives unused."""
    if not _is_number(ttl_s) or not 0 < ttl_s <= MAX_TTL_S:
        raise ValueError(f"ttl_s must be more than 0 and at most {MAX_TTL_S:g}, not {ttl_s!r:.100}")


def check_id(ident: str) -> None:
    """What can be the id of a session or a snapshot."""
    if not isinstance(ident, str) or not 0 < len(ident) <= _MAX_NAME or not ident.isprintable():
        raise ValueError(f"an id is text of 1 to {_MAX_NAME} characters, not {ident!r:.100}")


def check_step(expect_step: int | None) -> None:
    """A step to expect. Raises `SessionError` (step_conflict) for one that no execution can have."""
    if expect_step is not None and not isinstance(expect_step, int):
        raise ValueError(f"expect_step is a whole number, not {expect_step!r:.100}")
    if expect_step is not None and expect_step < 1:
        raise SessionError(f"steps are counted from 1: there is none of number {expect_step}", "step_conflict")


def check_copies(count: int, seeds: Sequence[int] | None) -> list[int] | None:
    """The seeds of `count` copies, as plain numbers."""
    if not isinstance(count, int) or not 1 <= count <= MAX_COPIES:
        raise ValueError(f"count must be 1 to {MAX_COPIES}, not {count!r:.100}")
    if seeds is None:
        return None
    try:
        plain = [operator.index(seed) for seed in seeds]
    except TypeError:
        raise ValueError(f"seeds are whole numbers, not {seeds!r:.100}") from None
    if len(plain) != count or not all(seed in _SEEDS for seed in plain):
        raise ValueError(f"seeds: {count} whole numbers of 64 bits are needed, one for each copy")
    return plain


def check_path(path: str) -> None:
    """A file of a session. Raises `SessionError` (bad_path) for text that names none."""
    if not isinstance(path, str):
        raise ValueError(f"a path is text, not {type(path).__name__}")
    if reason := paths.refusal(path):
        raise SessionError(reason, "bad_path")


def check_file(path: str, data: bytes) -> None:
    """A file of a session and what is to be in it. Raises `SessionError` (bad_path, too_large)."""
    check_path(path)
    if not isinstance(data, bytes | bytearray | memoryview):
        raise ValueError(f"a file's content is bytes, not {type(data).__name__}")
    if len(data) > paths.MAX_BYTES:
        raise SessionError(f"{len(data)} bytes; a file has at most {paths.MAX_BYTES}", "too_large")


def _is_texts(value: Any) -> bool:
    return isinstance(value, Collection) and not isinstance(value, str) and all(isinstance(each, str) for each in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)
