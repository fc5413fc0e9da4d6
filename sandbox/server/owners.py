"""Whose a session or snapshot is. Somebody else's does not exist: 404, as for one that never was."""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field

from sandbox.local_session import LocalSession
from sandbox.types import Session, SessionError

_KEEP_S = 900.0


@dataclass
class Owned:
    """A session and what its server remembers: `step` of its last execution."""

    owner: str
    session: LocalSession
    ttl_s: float
    step: int = 0
    used: float = field(default_factory=time.monotonic)


class Owners:
    """Sessions and snapshots by id, each bound to the token that made it."""

    def __init__(self, max_snapshots: int) -> None:
        self._sessions: dict[str, Owned] = {}
        self._snapshots: OrderedDict[str, tuple[str, int]] = OrderedDict()  # least recently used first
        self._most = 2 * max_snapshots  # the sandbox evicts those that it has no room for, and does not tell
        self._swept = time.monotonic()

    def add(self, owner: str, session: Session, ttl_s: float, step: int = 0) -> Owned:
        """Remember a new session."""
        self._sweep()
        assert isinstance(session, LocalSession)  # a server has an embedded sandbox
        owned = self._sessions[session.id] = Owned(owner, session, ttl_s, step)
        return owned

    def session(self, owner: str, ident: str) -> Owned:
        """The session. Raises `SessionError` (no_session)."""
        found = self._sessions.get(ident)
        if found is None or found.owner != owner:
            raise SessionError(f"there is no session {ident[:64]!r}", "no_session")
        found.used = time.monotonic()
        return found

    def forget(self, ident: str) -> None:
        """After it was closed."""
        self._sessions.pop(ident, None)

    def add_snapshot(self, owner: str, ident: str, step: int) -> None:
        """Remember a snapshot and the step it was taken at."""
        self._snapshots[ident] = (owner, step)
        while len(self._snapshots) > self._most:
            self._snapshots.popitem(last=False)

    def snapshot(self, owner: str, ident: str) -> int:
        """The snapshot's step. Raises `SessionError` (no_snapshot)."""
        found = self._snapshots.get(ident)
        if found is None or found[0] != owner:
            raise SessionError(f"there is no snapshot {ident[:64]!r}", "no_snapshot")
        self._snapshots.move_to_end(ident)
        return found[1]

    def forget_snapshot(self, ident: str) -> None:
        """After it was dropped."""
        self._snapshots.pop(ident, None)

    def _sweep(self) -> None:
        """Forget what must have ended long ago. For a while an ended session still answers 410 instead of 404."""
        now = time.monotonic()
        if now - self._swept < 60:
            return
        self._swept = now
        for ident, owned in list(self._sessions.items()):
            if now - owned.used > owned.ttl_s + _KEEP_S:
                del self._sessions[ident]
