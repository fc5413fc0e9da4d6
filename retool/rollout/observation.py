"""What the model is shown of an execution: plain text, short, the same for every engine and protocol.

On failure only the exception's own line(s) are shown, not the traceback (ReTool, arXiv 2504.11536, official
evaluation); text that is too long loses its middle, and the error at its end is what survives.
"""

from __future__ import annotations

from sandbox.types import ExecResult, Limits, Status

CUT = "..."


def render(result: ExecResult, chars: int, limits: Limits) -> str:
    """At most `chars` characters; never empty."""
    said = result.stdout.rstrip("\n")
    note = _note(result, limits)
    if not note:
        return middle_cut(said, chars) if said.strip() else "(no output)"
    note = middle_cut(note, chars)
    room = chars - len(note) - 1
    if said.strip() and room > len(CUT):
        return f"{middle_cut(said, room)}\n{note}"
    return note


def malformed(reason: str, chars: int) -> str:
    """What is shown when a turn ended like a call but holds nothing that could be run."""
    return middle_cut(f"error: {reason}", chars)


def middle_cut(text: str, chars: int) -> str:
    """`text` in at most `chars` characters: head and tail stay, `...` takes the middle's place."""
    if len(text) <= chars:
        return text
    room = chars - len(CUT)
    if room < 2:
        return text[:chars]
    tail = room // 2
    return f"{text[: room - tail]}{CUT}{text[len(text) - tail :]}"


def _note(result: ExecResult, limits: Limits) -> str:
    """The failure in one line (more when the exception's message has more), or an empty text."""
    match result.status:
        case Status.OK:
            return ""
        case Status.TIMEOUT:
            return f"error: timed out after {limits.wall_s:g} s"
        case Status.CPU_LIMIT:
            return f"error: used more than {limits.cpu_s:g} s of CPU time"
        case Status.MEMORY_LIMIT:
            return f"error: used more than {limits.memory_mb} MiB of memory"
        case Status.OUTPUT_LIMIT:
            return f"error: printed more than {limits.output_kill_bytes} bytes"
        case Status.SIGNAL:
            return f"error: killed by signal {result.signal}"
        case Status.REJECTED:
            return f"error: rejected: {_last_line(result.stderr) or 'this code cannot be run'}"
        case Status.CANCELLED:
            return "error: cancelled"
    if result.exception is not None:
        message = result.exception.message.strip()
        return f"{result.exception.type}: {message}" if message else result.exception.type
    if result.status is Status.EXIT:
        return f"error: exit code {result.exit_code}"
    return _last_line(result.stderr) or "error: the code failed"


def _last_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else ""
