"""Text to token ids and back, for one tokenizer and one protocol.

Sampled ids are never re-encoded: only deltas are encoded here (prompts, tool output, demonstrations). Untrusted text
(questions, tool output) can never become a control token, by three independent means: control strings in it are broken
with a backslash, special tokens are split, and the resulting ids are checked. The third matters because tokens added
with `add_tokens` match even with `split_special_tokens=True`, and a normaliser may create them from look-alikes.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from retool.protocols.base import ToolProtocol
from retool.protocols.template import CodecError, bind, render
from retool.records import Problem

_ANCHOR_TOKENS = 8  # how much of what came before is shown to the tokenizer when it encodes a delta
_SLOT = "\ue000question\ue000"  # stands for the question while the chat template is rendered


__all__ = ["Codec", "CodecError"]


class Codec:
    """`tokenizer`: a transformers tokenizer with a chat template. Raises `CodecError` when it cannot be used.

    `protocol` is the one given, or, for native tool calls, a copy of it in the chat template's own frame.
    """

    def __init__(self, tokenizer: Any, protocol: ToolProtocol) -> None:
        self.tokenizer = tokenizer
        self.protocol = protocol
        if not tokenizer.chat_template:
            raise CodecError("the tokenizer has no chat template; set `model.chat_template` in the recipe")
        if tokenizer.eos_token_id is None:
            raise CodecError("the tokenizer has no end-of-text token; add `eos_token` to its tokenizer_config.json")
        if protocol.native:
            self.protocol = bind(tokenizer, protocol)
        self._escapes: dict[str, str] = {}
        self._template: tuple[str, str] | None = None

    @property
    def eos_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @cached_property
    def special_ids(self) -> frozenset[int]:
        """Ids of special tokens (end of text, chat roles, padding, ...)."""
        added = self.tokenizer.added_tokens_decoder
        return frozenset(self.tokenizer.all_special_ids) | {i for i, t in added.items() if t.special}

    @cached_property
    def control_ids(self) -> frozenset[int]:
        """Ids that untrusted text must never yield: special and added tokens, and tags that are one token.

        Runs of white space that a tokenizer added for its own convenience control nothing and are left out.
        """
        ids = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.content.strip()} | self.special_ids
        for tag in self.protocol.control:
            encoded = self._raw(tag, split=False)
            if len(encoded) == 1:
                ids.add(encoded[0])
        return frozenset(ids)

    @cached_property
    def _control_strings(self) -> re.Pattern[str]:
        added = (t.content for t in self.tokenizer.added_tokens_decoder.values())
        strings = {*self.protocol.control, *self.tokenizer.all_special_tokens, *added}
        ordered = sorted((s for s in strings if s.strip()), key=len, reverse=True)
        # The look-ahead finds overlapping occurrences too: breaking one must not leave another whole.
        return re.compile(f"(?=({'|'.join(re.escape(s) for s in ordered)}))", re.DOTALL)

    def escape(self, text: str) -> str:
        """Untrusted text, made harmless: a backslash after the first character of every control string, and
        characters that the tokenizer does not know as backslash escapes. Text without either is unchanged."""
        text = self._broken(self._known(text))
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        if normalizer is not None and self._control_strings.search(normal := normalizer.normalize_str(text)):
            text = self._broken(normal)  # look-alikes: the tokenizer itself would make control strings of them
        return text

    def _broken(self, text: str) -> str:
        """`text` with a backslash after the first character of every control string."""
        starts = {m.start() for m in self._control_strings.finditer(text)}
        if not starts:
            return text
        return "".join(f"{c}\\" if i in starts else c for i, c in enumerate(text))

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """The chat template around one user message, ready for the assistant's turn."""
        before, after = self._prompt_frame()
        question = self._untrusted(problem.prompt.strip(), before)
        return (*self._trusted(before), *question, *self._trusted(after))

    def observation_ids(self, text: str, anchor_ids: Sequence[int]) -> tuple[int, ...]:
        """The delta for a tool result that follows `anchor_ids` (all ids so far, or a tail of them)."""
        anchor = self.decode(tuple(anchor_ids)[-_ANCHOR_TOKENS:])
        opening, body, closing = self.protocol.observation(self.escape(text))
        if anchor.endswith("\n"):  # the sampled token that completed the call brought the newline along
            opening = opening.removeprefix("\n")
        return (*self._trusted(opening, anchor), *self._untrusted(body, opening), *self._trusted(closing, body[-64:]))

    def demo_ids(self, text: str) -> tuple[int, ...]:
        """A demonstrated turn, tags included. Raises `CodecError` when it holds a special token's text."""
        ids = self._raw(text, split=False)
        if bad := [i for i in ids if i in self.special_ids]:
            token = self.tokenizer.convert_ids_to_tokens(bad[0])
            raise CodecError(
                f"a demonstration yields the special token {token!r}: it holds that token's text, or characters that "
                f"this tokenizer does not know; remove them from the trace: {text[:80]!r}"
            )
        return tuple(ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids, nothing skipped, nothing cleaned up."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def token_range(self, ids: Sequence[int], start: int, end: int) -> tuple[int, int]:
        """Half-open range of offsets of the tokens that hold the characters `start:end` of `decode(ids)`."""

        def tokens_within(chars: int) -> int:
            """How many leading tokens fit in that many characters."""
            low, high = 0, len(ids)
            while low < high:
                middle = (low + high + 1) // 2
                low, high = (middle, high) if len(self.decode(ids[:middle])) <= chars else (low, middle - 1)
            return low

        first, last = tokens_within(start), tokens_within(end)
        if last < len(ids) and len(self.decode(ids[:last])) < end:
            last += 1  # the token that the end falls into
        return first, max(first, last)

    def _prompt_frame(self) -> tuple[str, str]:
        """The rendered template before and after the question."""
        if self._template is None:
            messages = [{"role": "user", "content": self.protocol.user_message(_SLOT)}]
            text = render(self.tokenizer, messages, self.protocol.tools)
            if text.count(_SLOT) != 1:
                raise CodecError(
                    f"the chat template shows the user message {text.count(_SLOT)} times instead of once; "
                    "set `model.chat_template` in the recipe to one that shows it once, unchanged"
                )
            before, _, after = text.partition(_SLOT)
            self._template = before, after
        return self._template

    def _raw(self, text: str, split: bool) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=split))

    def _delta(self, text: str, anchor: str, split: bool) -> list[int]:
        """encode(anchor + text) minus encode(anchor), for the first anchor where the tokenizer does not merge over
        the seam: some tokenizers put a space in front of whatever starts a string, others merge `>` with a newline."""
        fallback: list[int] | None = None
        for candidate in dict.fromkeys((anchor, "", ".", "\n", "0")):
            head, whole = self._raw(candidate, split), self._raw(candidate + text, split)
            if whole[: len(head)] != head:
                continue
            delta = whole[len(head) :]
            if self.decode(delta) == text:
                return delta
            fallback = delta if fallback is None else fallback
        return self._raw(text, split) if fallback is None else fallback

    def _trusted(self, text: str, anchor: str = "") -> list[int]:
        return self._delta(text, anchor, split=False) if text else []

    def _untrusted(self, text: str, anchor: str) -> list[int]:
        """Ids of untrusted text; none of them is a control id, whatever the text and the tokenizer do."""
        text = self.escape(text)
        if not text:
            return []
        ids = self._delta(text, anchor[-1:], split=True)
        if self.control_ids.isdisjoint(ids):
            return ids
        # The tokenizer's normaliser made a control token of a look-alike: piece by piece there is nothing to match.
        ids = [i for c in text for i in self._raw(c, split=True) if i not in self.control_ids]
        if not self.control_ids.isdisjoint(ids):
            raise AssertionError("untrusted text yielded a control token")
        return ids

    def _known(self, text: str) -> str:
        """`text` with what the tokenizer cannot represent written as Python would escape it."""
        text = text.encode("utf-8", "backslashreplace").decode("utf-8")  # lone surrogates
        unknown = self.tokenizer.unk_token_id
        if unknown is None or (text.isascii() and text.isprintable()):
            return text
        return "".join(self._escapes.get(c) or self._escape_of(c, unknown) for c in text)

    def _escape_of(self, char: str, unknown: int) -> str:
        if char not in self._escapes:
            code = ord(char)
            escaped = f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" if code < 65536 else f"\\U{code:08x}"
            known = unknown not in self._raw(char, split=True)
            self._escapes[char] = char if known else escaped
        return self._escapes[char]
