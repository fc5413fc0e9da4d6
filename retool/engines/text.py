"""What sampled tokens spell: where a stop string ends, and which tokens would complete a banned one.

Tokens are never cut: a stop string counts when the token that completes it has been sampled.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_WINDOW = 16  # tokens decoded together when a character is spread over several


class Pieces:
    """The text that each token adds behind others, looked up once a token."""

    def __init__(self, tokenizer: Any, vocab: int) -> None:
        self.tokenizer = tokenizer
        self.vocab = vocab
        anchor = tokenizer.encode("a", add_special_tokens=False)
        self._anchor = anchor[-1:] if anchor else []
        self._skip = len(self.decode(self._anchor))
        self._pieces: dict[int, str] = {}

    def decode(self, ids: Sequence[int]) -> str:
        """Plain decoding: nothing is skipped or cleaned up."""
        text: str = self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return text

    def __getitem__(self, token: int) -> str:
        piece = self._pieces.get(token)
        if piece is None:
            known = token < len(self.tokenizer)
            piece = self.decode([*self._anchor, token])[self._skip :] if known else ""
            self._pieces[token] = piece
        return piece

    def partial(self, token: int) -> bool:
        """True when the token is a fragment of a character."""
        return "\ufffd" in self[token]


class Bans:
    """Masks of the tokens that would complete a banned string behind a given text."""

    def __init__(self, pieces: Pieces, banned: tuple[str, ...], tokens: frozenset[int], device: torch.device) -> None:
        if any(not b for b in banned):
            raise ValueError("a banned string is empty")
        self.banned = banned
        self.keep = max((len(b) for b in banned), default=1) - 1
        self._pieces = pieces
        self._tokens = tokens
        self._device = device
        self._masks: dict[tuple[int, ...], torch.Tensor] = {}

    def mask(self, tail: str) -> torch.Tensor:
        """[V] True where the token is forbidden behind `tail`."""
        state = tuple(
            next((k for k in range(min(len(b) - 1, len(tail)), 0, -1) if tail.endswith(b[:k])), 0) for b in self.banned
        )
        mask = self._masks.get(state)
        if mask is None:
            mask = self._masks[state] = self._build(state)
        return mask

    def _build(self, state: tuple[int, ...]) -> torch.Tensor:
        bad = list(self._tokens)
        starts = [b[:k] for b, k in zip(self.banned, state)]
        for token in range(self._pieces.vocab):
            piece = self._pieces[token]
            if any(b in start + piece for b, start in zip(self.banned, starts)):
                bad.append(token)
        mask = torch.zeros(self._pieces.vocab, dtype=torch.bool)
        mask[bad] = True
        return mask.to(self._device)


class Tail:
    """The end of the text sampled since the last foreign token, and the search for strings that end in it."""

    __slots__ = ("_ids", "_pieces", "text")

    def __init__(self, pieces: Pieces) -> None:
        self._pieces = pieces
        self._ids: list[int] = []
        self.text = ""

    def copy(self) -> Tail:
        """An independent tail with the same text."""
        other = Tail(self._pieces)
        other._ids, other.text = list(self._ids), self.text
        return other

    def push(self, token: int, strings: tuple[str, ...], keep: int) -> str | None:
        """Add a token; the first of `strings` that it completes. `keep`: characters remembered."""
        self._ids.append(token)
        piece = self._pieces[token]
        if "\ufffd" in piece or self.text.endswith("\ufffd"):
            return self._push_partial(strings, keep)
        found = None
        for s in strings:
            # only the part of the tail that `piece` can complete: an older occurrence does not count
            if s[-1] in piece and s in (self.text[1 - len(s) :] if len(s) > 1 else "") + piece:
                found = s
                break
        self.text = (self.text + piece)[-max(keep, 1) :]
        if len(self._ids) > 4 * _WINDOW:
            del self._ids[:-_WINDOW]
        return found

    def completes(self, token: int, strings: tuple[str, ...]) -> bool:
        """Whether this token would complete one of the strings; nothing changes."""
        probe = Tail(self._pieces)
        probe._ids, probe.text = self._ids[-_WINDOW:], self.text
        return probe.push(token, strings, len(self.text)) is not None

    def _push_partial(self, strings: tuple[str, ...], keep: int) -> str | None:
        """A character spread over several tokens: decode a window, with and without the newest token."""
        now = self._pieces.decode(self._ids[-_WINDOW:])
        before = self._pieces.decode(self._ids[-_WINDOW:-1])
        self.text = now[-max(keep, 1) :]
        return next((s for s in strings if now.count(s) > before.count(s)), None)
