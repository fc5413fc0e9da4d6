"""The protocols by name."""

from __future__ import annotations

from collections.abc import Callable

from retool.config import ProtocolConfig
from retool.protocols.base import ToolProtocol
from retool.protocols.fenced import FencedProtocol
from retool.protocols.hermes import HermesProtocol
from retool.protocols.tags import TagProtocol

PROTOCOLS: dict[str, Callable[[ProtocolConfig], ToolProtocol]] = {
    "tags": TagProtocol,
    "hermes": HermesProtocol,
    "fenced": FencedProtocol,
}


def build_protocol(config: ProtocolConfig) -> ToolProtocol:
    """The protocol that a recipe names. Raises `ProtocolError` or `UserError`."""
    return PROTOCOLS[config.name](config)
