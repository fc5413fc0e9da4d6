"""How a tool call looks in text, and how text becomes tokens without untrusted text ever becoming a control token."""

from retool.protocols.base import Call, Malformed, ToolProtocol
from retool.protocols.build import build_protocol
from retool.protocols.codec import Codec, CodecError
from retool.protocols.fenced import FencedProtocol
from retool.protocols.hermes import HermesProtocol
from retool.protocols.tags import ProtocolError, TagProtocol

__all__ = [
    "Call",
    "Codec",
    "CodecError",
    "FencedProtocol",
    "HermesProtocol",
    "Malformed",
    "ProtocolError",
    "TagProtocol",
    "ToolProtocol",
    "build_protocol",
]
