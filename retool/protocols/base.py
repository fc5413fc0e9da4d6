"""How a tool call looks in text. One implementation a format; every one passes `tests/protocols/contract.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True)
class Call:
    """A well-formed call; `start:end` is the range of characters of the call (tags included) in the turn's text."""

    code: str
    start: int
    end: int


@dataclass(frozen=True)
class Malformed:
    """The turn ended like a call but holds nothing that could be run. `reason` is shown to the model."""

    reason: str
    start: int
    end: int


class ToolProtocol(Protocol):
    """A grammar for tool calls. Texts here are decoded turns; ids are never made from them."""

    name: str
    native: bool
    """True when results are messages of the chat template: `Codec` then binds the template's own frame around them."""

    @property
    def tools(self) -> list[dict[str, Any]] | None:
        """Schemas of the tools that the chat template declares, or None."""
        ...

    @property
    def single(self) -> tuple[str, ...]:
        """Strings that a tokenizer made from scratch gets as one token each."""
        ...

    @property
    def stop(self) -> tuple[str, ...]:
        """Strings that end a turn because they end a call."""
        ...

    @property
    def call_open(self) -> str:
        """The string that opens a call; banned when evaluating without the tool."""
        ...

    @property
    def control(self) -> tuple[str, ...]:
        """Strings that untrusted text must never contain."""
        ...

    def instructions(self) -> str:
        """What the model is told about the tool, in front of the question."""
        ...

    def user_message(self, question: str) -> str:
        """The whole user message of one problem, `question` already escaped."""
        ...

    def parse(self, turn_text: str) -> Call | Malformed | None:
        """The last call of a turn, what is wrong with it, or None when the turn makes no call."""
        ...

    def observation(self, text: str) -> tuple[str, str, str]:
        """(opening, body, closing) around an escaped tool result: the delta after a call's stop string."""
        ...

    def forged(self, policy_text: str) -> bool:
        """True when the policy wrote an observation itself."""
        ...

    def strip_forged(self, policy_text: str) -> str:
        """The text without the observation blocks that the policy wrote itself."""
        ...

    def answer(self, policy_text: str) -> str | None:
        """The answer section of a finished text, or None."""
        ...

    def render_call(self, code: str) -> str:
        """A call as the model should write it, up to and including its stop string; `parse` gives `code` back."""
        ...

    def render_answer(self, answer: str) -> str:
        """An answer section as the model should write it; what a verifier extracts from it is `answer`."""
        ...

    def candidates(self, policy_text: str) -> list[str]:
        """Every answer that the text offers in the place where answers are read; the last one counts."""
        ...

    def check(self, trace: str) -> list[str]:
        """What is wrong with a whole trace (turns and observations) as training material; empty when nothing is."""
        ...
