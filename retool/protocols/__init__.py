"""How a tool call looks in text, and how text becomes tokens without untrusted text ever becoming a control token."""

from retool.protocols.base import Call, Malformed, ToolProtocol
from retool.protocols.codec import Codec, CodecError
from retool.protocols.tags import ProtocolError, TagProtocol, build_protocol

__all__ = ["Call", "Codec", "CodecError", "Malformed", "ProtocolError", "TagProtocol", "ToolProtocol", "build_protocol"]
