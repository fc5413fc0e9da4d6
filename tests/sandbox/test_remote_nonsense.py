"""Servers that are none of ours, or full, beside one that works: they lose the traffic, and no call is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator

import pytest

from sandbox.codec import parse_error
from sandbox.remote import RemoteSandbox
from sandbox.remote_endpoint import Answer, Endpoint
from sandbox.types import SandboxInfraError, SandboxOverloaded, SandboxProtocolError, SandboxUnavailable
from tests.sandbox.liars import http_answer, liar
from tests.sandbox.serving import Served, served

_FULL = b'{"error":{"code":"overloaded","message":"x","retryable":true,"class":"overload"%s}}'
NONSENSE = {
    "a page": http_answer(b"<html>", b"text/html"),
    "half an object": http_answer(b"{"),
    "a list": http_answer(b"[1]"),
    "too deep": http_answer(b"[" * 100_000),
    "an empty object": http_answer(b"{}"),
    "another object": http_answer(b'{"hello": 1}'),
    "a status of ours": http_answer(b'{"status": "infra_error"}'),
    "not found": http_answer(b"<html>", b"text/html", b"404 Not Found"),
    "a redirect": http_answer(b"", b"text/html", b"302 Found"),
    "a failure": http_answer(b"<html>", b"text/html", b"500 Oops"),
    "a malformed error": http_answer(b'{"error": 7}', status=b"418 Teapot"),
    "a malformed result": http_answer(b'{"status": "ok", "stdout": 1, "exception": null}'),
    "nothing": http_answer(b"", b"application/x-ndjson"),
}


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--workers", "2") as it:
        yield it


async def in_turns(box: RemoteSandbox, count: int, width: int) -> list[str]:
    """What so many executions print, `width` at a time."""
    slots = asyncio.Semaphore(width)

    async def one(number: int) -> str:
        async with slots:
            return (await box.exec(f"print({number})")).stdout

    return await asyncio.gather(*(one(number) for number in range(count)))


@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE)
async def test_nonsense_is_a_protocol_error_never_a_result(answer: bytes) -> None:
    async with liar(answer, greets=True) as it, RemoteSandbox(it.url, total_s=20) as box:
        with pytest.raises(SandboxProtocolError):
            await box.exec("1")
        assert it.asked == 3


@pytest.mark.parametrize("width", [4, 40], ids=["alone", "together"])
@pytest.mark.parametrize("answer", NONSENSE.values(), ids=NONSENSE)
async def test_a_server_that_answers_nonsense_costs_no_call_and_is_left_alone(
    server: Served, answer: bytes, width: int
) -> None:
    async with liar(answer, greets=True) as bad, RemoteSandbox([bad.url, server.url]) as box:
        assert await in_turns(box, 40, width) == [f"{number}\n" for number in range(40)]
        assert bad.asked <= 10 and (bad.asked < 5 or box.endpoints[0].breaker.opened)
        async with box.session() as session:
            assert (await session.exec("print(7)")).stdout == "7\n"


@pytest.mark.parametrize("wish", [b"", b',"retry_after":1e9', b',"retry_after":NaN', b',"retry_after":"soon"'])
async def test_while_one_server_is_full_another_that_is_free_is_asked(server: Served, wish: bytes) -> None:
    answer = http_answer(_FULL % wish, status=b"429 Too Many Requests")
    async with liar(answer, greets=True) as full, RemoteSandbox([full.url, server.url], total_s=20) as box:
        started = time.monotonic()
        assert await in_turns(box, 40, 4) == [f"{number}\n" for number in range(40)]
        assert full.asked <= 12 and time.monotonic() - started < 8, "it is not waited for"


@pytest.mark.parametrize("wish", [b',"retry_after":1e9', b',"retry_after":NaN', b',"retry_after":-5'])
async def test_no_wish_of_a_full_server_makes_a_call_hang(wish: bytes) -> None:
    async with (
        liar(http_answer(_FULL % wish, status=b"429 Too Many Requests"), greets=True) as full,
        RemoteSandbox(full.url, total_s=2) as box,
    ):
        async with asyncio.timeout(10):
            with pytest.raises(SandboxOverloaded):
                await box.exec("1")


@pytest.mark.parametrize(("wish", "seconds"), [(0.5, 0.5), (1e9, 60), (-5, 0), (float("nan"), 1), ("5", 1), (None, 1)])
def test_a_wish_is_a_number_of_seconds_within_reason(wish: object, seconds: float) -> None:
    error = parse_error(
        {"code": "overloaded", "message": "", "retryable": True, "class": "overload", "retry_after": wish}
    )
    assert isinstance(error, SandboxOverloaded) and error.retry_after == seconds


async def test_what_a_server_of_ours_refuses_is_final(server: Served) -> None:
    body = b'{"error":{"code":"gone","message":"x","retryable":false,"class":"request"}}'
    async with liar(http_answer(body, status=b"410 Gone"), greets=True) as it, RemoteSandbox(it.url) as box:
        with pytest.raises(SandboxInfraError) as refused:
            await box.exec("1")
        assert (refused.value.code, it.asked, box.retries) == ("gone", 1, 0)


async def test_nonsense_instead_of_a_files_bytes(server: Served) -> None:
    async with liar(NONSENSE["a page"], greets=True) as bad, RemoteSandbox(server.url) as box, box.session() as session:
        await session.write_file("f", b"data")
        home, session._endpoint = session._endpoint, Endpoint(bad.url, None, 1)  # type: ignore[attr-defined]
        with pytest.raises(SandboxProtocolError):
            await session.read_file("f")
        await session._endpoint.close()  # type: ignore[attr-defined]
        session._endpoint = home  # type: ignore[attr-defined]
        assert await session.read_file("f") == b"data"


async def test_an_endless_answer_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox.remote_endpoint.MAX_ANSWER", 100_000)
    async with liar(http_answer(b" " * 200_000)) as it:
        endpoint = Endpoint(it.url, None, 1)
        with pytest.raises(SandboxProtocolError, match="100000"):
            await endpoint.send("GET", "/", seconds=5)
        await endpoint.close()


def test_a_gateways_page_is_unavailability_not_nonsense() -> None:
    assert isinstance(Answer(502, b"<html>", "text/html").error(), SandboxUnavailable)
    assert Answer(200, b"{}").error() is None
