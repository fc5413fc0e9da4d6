"""A session that is closed while it is copied: its tree ends once, and nobody else notices."""

from __future__ import annotations

import asyncio
import contextlib
import random

from sandbox import LocalSandbox, SessionError
from sandbox.types import Session


async def _fork(session: Session, count: int) -> None:
    with contextlib.suppress(SessionError):
        for branch in await session.fork(count):
            await branch.close()


async def test_closing_what_is_being_copied_harms_nobody() -> None:
    pauses = random.Random(7)
    async with LocalSandbox("py-bare", workers=2) as box, box.session() as other:
        await other.exec("x = 7")
        for _ in range(120):
            session = await box.session()
            fork = asyncio.create_task(_fork(session, pauses.randrange(1, 4)))
            await asyncio.sleep(pauses.random() * 0.008)
            async with asyncio.timeout(8):
                await session.close()
                await fork
        stats = await box.stats()
        assert (stats["leaked"], stats["restarts"], stats["sessions"]) == (0, 0, 1), stats
        assert (await other.exec("print(x)")).stdout == "7\n"
        assert (await box.exec("print(1)")).ok
