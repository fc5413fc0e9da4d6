"""A supervisor that hangs: nobody waits for ever, and the next call finds another one."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal

import pytest

from sandbox import Limits, LocalSandbox, SandboxUnavailable, link
from tests.sandbox.serving import served


async def test_a_supervisor_that_hangs_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(link, "PING_S", 0.1)
    async with LocalSandbox("py-bare", Limits(wall_s=20), workers=2) as box:
        supervisor = (await box.stats())["supervisor_pid"]
        os.kill(supervisor, signal.SIGSTOP)
        lost = await asyncio.wait_for(asyncio.gather(*(box.exec("1") for _ in range(3)), return_exceptions=True), 30)
        assert all(isinstance(each, SandboxUnavailable) and "not answer" in str(each) for each in lost), lost
        assert (await box.exec("print(1)")).stdout == "1\n"
        stats = await box.stats()
        assert stats["supervisor_pid"] != supervisor and stats["supervisor_restarts"] == 1


async def test_work_that_takes_long_is_no_hang_and_an_idle_sandbox_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(link, "PING_S", 0.05)
    async with LocalSandbox("py-bare", Limits(wall_s=20), workers=2) as box:
        code = f"import time; time.sleep({4 * link.PINGS * link.PING_S}); print('done')"
        assert (await box.exec(code)).stdout == "done\n"
        await asyncio.sleep(0.5)
        assert box._link is not None and box._link._watch is None


@pytest.mark.slow
def test_a_server_whose_supervisor_hangs_answers_everything_and_is_not_healthy() -> None:
    with served("--workers", "2") as server, server.client() as http:
        fields = {"code": "print(1)", "limits": {"wall_s": 1}, "deadline_ms": 1000}
        supervisor = http.get("/v1/stats").json()["supervisor_pid"]
        os.kill(supervisor, signal.SIGSTOP)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            waiting = [pool.submit(http.post, "/v1/exec", json=fields) for _ in range(4)]
            waiting += [pool.submit(http.get, path) for path in ("/v1/stats", "/v1/capabilities", "/healthz")]
            answers = [each.result(60) for each in waiting]
        assert [(answer.status_code, answer.json()["error"]["code"]) for answer in answers] == [
            (503, "unavailable")
        ] * len(answers)
        assert http.post("/v1/exec", json=fields).json()["stdout"] == "1\n"
        assert http.get("/healthz").status_code == 200


def test_a_body_of_very_many_values_is_not_read() -> None:
    """Reading 30 MiB of them would hold up everybody for seconds and take a GiB."""
    with served("--workers", "1") as server, server.client() as http:
        for body in (b'{"items":[' + b"[]," * 1_000_000 + b"[]]}", b"[" + b'"",' * 1_000_000 + b'""]'):
            for path in ("/v1/exec", "/v1/batch", "/v1/sessions", "/run_code"):
                answer = http.post(path, content=body)
                assert (answer.status_code, answer.json()["error"]["code"]) == (413, "too_large"), answer.text
        code = "x = '" + "[]," * 120_000 + "'; print(len(x), '\\\\\\\"')"
        assert http.post("/v1/exec", json={"code": code}).json()["stdout"] == '360000 \\"\n'
