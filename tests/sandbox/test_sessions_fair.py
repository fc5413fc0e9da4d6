"""Executions in sessions of several owners take turns."""

from __future__ import annotations

import asyncio

from sandbox import LocalSandbox


async def test_owners_take_turns_in_their_sessions() -> None:
    done: list[str] = []
    async with LocalSandbox("py-bare", workers=1) as box:
        sessions = [await box.session() for _ in range(6)]

        async def execute(index: int, owner: str) -> None:
            code = "import time; time.sleep(0.2)"
            options = {"stdin": "", "limits": None, "expect_step": None, "rich": False}
            await sessions[index].exec_fields(code, owner=owner, **options)  # type: ignore[attr-defined]
            done.append(owner)

        tasks = [asyncio.create_task(execute(index, "many")) for index in range(5)]
        await asyncio.sleep(0.1)  # all of them are under way, or wait
        tasks.append(asyncio.create_task(execute(5, "one")))
        await asyncio.gather(*tasks)
    assert done.index("one") <= 2, done
