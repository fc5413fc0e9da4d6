"""Small packets with file descriptors: how the supervisor talks with its warm unit, the warden and the zygote.

The zygote imports this, and every page that it maps is mapped anew for each run: nothing large is imported here.
"""

from __future__ import annotations

import array
import os
import socket
import struct

PACKET = struct.Struct("!cQqqqq")
"""kind, id, and four numbers whose meaning depends on the kind."""
MAX_FDS = 8
_SPACE = socket.CMSG_SPACE(MAX_FDS * array.array("i").itemsize)
_SENDMSG = socket.socket.sendmsg  # the zygote replaces it for those that it forks

SPAWN = b"S"
"""To the zygote: fork a child. numbers: uid, 1 to join a control group. fds: job, stdout, stderr, report[, pidfd of its
init][, where to join the group]; a work folder is named by the id."""
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
    _SENDMSG(sock, [payload], ancillary)


def receive_packet(sock: socket.socket, flags: int = 0) -> tuple[bytes, int, tuple[int, ...], list[int]] | None:
    """The next packet as (kind, id, numbers, file descriptors), or None at the end."""
    try:
        data, ancillary, _, _ = sock.recvmsg(PACKET.size, _SPACE, flags | socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    if len(data) != PACKET.size:
        for fd in fds:
            os.close(fd)
        return None
    unpacked = PACKET.unpack(data)
    return unpacked[0], unpacked[1], tuple(unpacked[2:]), list(fds)
