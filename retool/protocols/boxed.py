r"""Find `\boxed{...}` in a text, braces balanced, in one linear pass (the text may be hostile and a megabyte long)."""

from __future__ import annotations

import re

_EVENT = re.compile(r"\\boxed\s{0,8}\{|\\.|[{}]", re.DOTALL)


def boxed(text: str) -> list[str]:
    r"""Contents of the outermost balanced boxes, in order; an unbalanced box is no box. Escaped braces do not count.

    `\boxed{\frac{1}{2}}` gives `\frac{1}{2}`.
    """
    return [text[start:end].strip() for start, end in boxed_spans(text)]


def boxed_spans(text: str) -> list[tuple[int, int]]:
    """Ranges of characters of those contents; the closing brace of a box stands at its range's end."""
    stack: list[int] = []  # start of a box's content, or -1 for a plain brace
    found: list[tuple[int, int]] = []
    for event in _EVENT.finditer(text):
        token = event.group()
        if token == "{":
            stack.append(-1)
        elif token == "}":
            if stack and (start := stack.pop()) >= 0:
                while found and found[-1][0] >= start:
                    found.pop()  # a box inside this one
                found.append((start, event.start()))
        elif token.endswith("{") and token.startswith("\\boxed"):
            stack.append(event.end())
    return found
