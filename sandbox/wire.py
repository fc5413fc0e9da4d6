"""How processes of the sandbox talk: framed JSON for requests, small packets with file descriptors for the warm unit.

Sizes are bounded on both sides, nothing is ever unpickled.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
import struct
from typing import Any

from sandbox.types import SandboxProtocolError

MAX_FRAME = 64 * 1024 * 1024
"""Bytes of the largest message between client and supervisor."""
_HEADER = struct.Struct("!I")
_JSON = json.JSONEncoder(separators=(",", ":"))


def pack_frame(message: dict[str, Any]) -> bytes:
    """A message as length and JSON. Lone surrogates survive. Raises `SandboxProtocolError` when too large."""
    body = _JSON.encode(message).encode("ascii")
    if len(body) > MAX_FRAME:
        raise SandboxProtocolError(f"message of {len(body)} bytes exceeds {MAX_FRAME}")
    return _HEADER.pack(len(body)) + body


async def read_frame(reader: asyncio.StreamReader) -> dict[str, Any] | None:
    """The next message, or None at the end of the stream. Raises `SandboxProtocolError` for anything else."""
    try:
        (size,) = _HEADER.unpack(await reader.readexactly(_HEADER.size))
        if size > MAX_FRAME:
            raise SandboxProtocolError(f"frame of {size} bytes exceeds {MAX_FRAME}")
        message = json.loads(await reader.readexactly(size))
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    except ValueError as error:
        raise SandboxProtocolError(f"frame is not JSON: {error}") from error
    if not isinstance(message, dict):
        raise SandboxProtocolError(f"frame holds {type(message).__name__}, not an object")
    return message


# --- packets between the supervisor and its warm unit (warden and zygote) -----------------------------------------

PACKET = struct.Struct("!cQqqqq")
"""kind, id, and four numbers whose meaning depends on the kind."""
MAX_FDS = 8

SPAWN = b"S"
"""To the zygote: fork a child. numbers: uid, pid as it will see itself (0: not known), 1 to join a control group. fds:
job, stdout, stderr, report[, pidfd of its init][, where to join the group]; a work folder is named by the id."""
SPAWNED = b"s"
"""From the zygote: numbers: pid."""
EXITED = b"x"
"""From the zygote: numbers: wait status, CPU in microseconds, largest resident set in KiB."""
UNKNOWN_STATUS = -1
"""Wait status of a process whose end nobody saw."""
FAILED = b"f"
"""From either: the request failed; numbers: errno."""
INIT = b"I"
"""To the warden: make a process namespace. fds: the socket its init will obey (`worker/init.py`). Answered with the
same kind and the init's pidfd."""
PURGE = b"P"
"""To the warden: kill everything that runs as a user id. numbers: uid. Answered with the same kind."""
ADOPT = b"A"
"""To the zygote: a live interpreter has copied itself, as a child of the zygote. fds: the copy's pidfd. Its end is told
like that of any child."""
READY = b"R"
"""From the zygote, once: warm. numbers: address space in bytes, pid, number of threads."""


def send_packet(
    sock: socket.socket, kind: bytes, ident: int = 0, numbers: tuple[int, ...] = (), fds: tuple[int, ...] = ()
) -> None:
    """Send one packet on a `SOCK_SEQPACKET` socket."""
    payload = PACKET.pack(kind, ident, *(*numbers, 0, 0, 0, 0)[:4])
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([payload], ancillary)


def receive_packet(sock: socket.socket, flags: int = 0) -> tuple[bytes, int, tuple[int, ...], list[int]] | None:
    """The next packet as (kind, id, numbers, file descriptors), or None at the end."""
    size = array.array("i").itemsize
    try:
        data, ancillary, _, _ = sock.recvmsg(PACKET.size, socket.CMSG_SPACE(MAX_FDS * size), flags)
    except ConnectionError:
        return None
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % size])
    for fd in fds:
        os.set_inheritable(fd, False)
    if len(data) != PACKET.size:
        for fd in fds:
            os.close(fd)
        return None
    unpacked = PACKET.unpack(data)
    return unpacked[0], unpacked[1], tuple(unpacked[2:]), list(fds)
