"""What comes over the wire and is not a decent request: it is answered in the documented shape, if at all, and costs
the server and its other clients next to nothing."""

from __future__ import annotations

import json
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from sandbox.server.protocol import HEAD_S, MAX_HEAD, MAX_PIPELINE
from tests.sandbox.serving import TOKEN, Served, eventually, served

_HEAD = b"POST /v1/exec HTTP/1.1\r\nHost: x\r\n"
_BODY = b'{"code": "print(1)"}'


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--workers", "2", env={"RETOOL_SANDBOX_TOKEN": TOKEN}) as it:
        yield it


def connect(server: Served) -> socket.socket:
    return socket.create_connection(server.address, timeout=30)


def until_closed(link: socket.socket) -> bytes:
    """All that comes until the server hangs up; an error when it does not."""
    received = b""
    try:
        while data := link.recv(65536):
            received += data
    except ConnectionResetError:
        pass
    return received


def one_answer(link: socket.socket) -> tuple[int, Any]:
    """Status and JSON of the next answer on a connection that stays open."""
    received = b""
    while b"\r\n\r\n" not in received:
        received += link.recv(65536)
    head, _, body = received.partition(b"\r\n\r\n")
    length = int(head.lower().split(b"content-length:")[1].split()[0])
    while len(body) < length:
        body += link.recv(65536)
    return int(head.split()[1]), json.loads(body)


def refused(received: bytes) -> tuple[int, str]:
    """Status and code of an answer in the documented shape."""
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/json" in head.lower(), received[:500]
    error = json.loads(body)["error"]
    assert {"code", "message", "retryable", "class"} <= set(error)
    return int(head.split()[1]), error["code"]


def memory_mb(server: Served) -> int:
    text = Path(f"/proc/{server.process.pid}/status").read_text()
    return int(text.split("VmRSS:")[1].split()[0]) // 1024


def send_while_open(link: socket.socket, piece: bytes, most: int) -> int:
    """Send up to `most` bytes until the server has hung up; returns how many it took."""
    sent = 0
    try:
        while sent < most:
            link.sendall(piece)
            sent += len(piece)
    except OSError:
        pass
    return sent


@pytest.mark.parametrize(
    ("start", "piece"),
    [
        (_HEAD, b"".join(b"X%05d: a\r\n" % number for number in range(5000))),
        (_HEAD + b"X: ", b"a" * 65536),
        (b"GET /", b"a" * 65536),
        (b"", b"\r\n" * 32768),
        (_HEAD + b"Transfer-Encoding: chunked\r\n\r\n1;x=", b"a" * 65536),
        (_HEAD + b"Transfer-Encoding: chunked\r\n\r\n0\r\n", b"".join(b"T%05d: a\r\n" % n for n in range(5000))),
    ],
    ids=["headers", "header", "url", "blank lines", "chunk extension", "trailers"],
)
def test_what_never_ends_is_cut_off_soon(server: Served, start: bytes, piece: bytes) -> None:
    before = memory_mb(server)
    with connect(server) as link:
        link.sendall(start)
        send_while_open(link, piece, 64 * 1024 * 1024)
        link.settimeout(5)
        until_closed(link)
    assert memory_mb(server) - before < 32


def test_a_head_may_be_large_but_not_larger(server: Served) -> None:
    def ask(size: int) -> bytes:
        with connect(server) as link:
            link.sendall(b"GET /v1/ping HTTP/1.1\r\nConnection: close\r\nX: %s\r\n\r\n" % (b"a" * size))
            return until_closed(link)

    assert ask(MAX_HEAD - 1000).startswith(b"HTTP/1.1 200")
    for size in (MAX_HEAD, 3 * MAX_HEAD, 20 * MAX_HEAD):
        assert refused(ask(size)) == (431, "too_large")
    with connect(server) as link:
        body = b'{"code": "' + b"#" * 5 * MAX_HEAD + b'"}'
        head = b"%sAuthorization: Bearer %s\r\nContent-Length: %d\r\n\r\n" % (_HEAD, TOKEN.encode(), len(body))
        link.sendall(head + body)
        assert one_answer(link)[0] == 200, "a body is no head"


def test_a_request_that_never_becomes_whole_is_given_up(server: Served) -> None:
    begun = time.monotonic()
    with connect(server) as head, connect(server) as trickle, connect(server) as body, connect(server) as good:
        head.sendall(b"POST /v1/ex")
        trickle.sendall(_HEAD + b"X: ")
        body.sendall(_HEAD + b"Content-Length: 1000000\r\n\r\n")
        assert one_answer(body)[0] == 401
        body.sendall(b"{")
        good.sendall(b"GET /v1/ping HTTP/1.1\r\n\r\n")
        assert one_answer(good) == (200, "pong")
        while time.monotonic() - begun < HEAD_S - 1:
            trickle.sendall(b"a")
            time.sleep(0.5)
        assert refused(until_closed(head)) == (408, "invalid_request")
        assert refused(until_closed(trickle)) == (408, "invalid_request")
        assert until_closed(body) == b""
        good.sendall(b"GET /v1/ping HTTP/1.1\r\n\r\n")
        assert one_answer(good) == (200, "pong"), "who has asked decently may stay"
    assert time.monotonic() - begun < 3 * HEAD_S


def test_a_body_that_comes_after_its_refusal_leaves_the_connection_usable(server: Served) -> None:
    with connect(server) as link:
        for _ in range(2):
            link.sendall(_HEAD + b"Content-Length: %d\r\n\r\n" % len(_BODY))
            assert one_answer(link)[0] == 401
            link.sendall(_BODY)
        link.sendall(b"GET /v1/ping HTTP/1.1\r\n\r\n")
        assert one_answer(link) == (200, "pong")


def test_more_connections_than_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = tmp_path / "python"
    few.write_text(f'#!/bin/sh\nulimit -n 1024\nexec {sys.executable} "$@"\n')
    few.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(few))
    with served("--workers", "1") as server:
        links = []
        try:
            for number in range(1200):
                links.append(connect(server))
                links[-1].sendall(b"POST /v1/ex" if number % 2 else b"")
            with server.client() as http:
                for number in range(5):
                    assert http.post("/v1/exec", json={"code": f"print({number})"}).json()["stdout"] == f"{number}\n"
        finally:
            for link in links:
                link.close()


def test_very_many_requests_at_once_on_one_connection_are_too_many(server: Served) -> None:
    piece = b"GET /v1/ping HTTP/1.1\r\n\r\n"
    with connect(server) as link:
        link.sendall(piece * (MAX_PIPELINE // 2) + piece.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n"))
        assert until_closed(link).count(b'"pong"') == MAX_PIPELINE // 2 + 1
    before = memory_mb(server)
    with connect(server) as link:
        link.settimeout(20)
        send_while_open(link, piece * 10_000, 100_000_000)
        until_closed(link)
    assert memory_mb(server) - before < 32


@pytest.mark.parametrize("pieces", [1, 2, 50])
@pytest.mark.parametrize("framing", [b"Content-Length: 20\r\n\r\n" + _BODY, b"Transfer-Encoding: chunked\r\n\r\n"])
def test_an_offer_to_speak_something_else_is_ignored(server: Served, framing: bytes, pieces: int) -> None:
    """As `curl --http2` and Java's client make it."""
    if b"chunked" in framing:
        framing += b"14\r\n" + _BODY + b"\r\n0\r\n\r\n"
    offer = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    whole = b"%sAuthorization: Bearer %s\r\n%s%s" % (_HEAD, TOKEN.encode(), offer, framing)
    step = -(-len(whole) // pieces)
    with connect(server) as link:
        for _ in range(2):
            for start in range(0, len(whole), step):
                link.sendall(whole[start : start + step])
                time.sleep(0.002 if pieces > 1 else 0)
            status, result = one_answer(link)
            assert (status, result["stdout"]) == (200, "1\n"), result


@pytest.mark.parametrize(
    "bytes_",
    [
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"NONSENSE /v1/exec HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT example.com:443 HTTP/1.1\r\nHost: x\r\n\r\n",
        _HEAD + b"Content-Length: -5\r\n\r\nabc",
        _HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"GET /v1/\x00 HTTP/1.1\r\n\r\n",
    ],
)
def test_what_is_no_http_is_refused_as_everything_is(server: Served, bytes_: bytes) -> None:
    with connect(server) as link:
        link.sendall(bytes_)
        assert refused(until_closed(link)) == (400, "invalid_request")


def test_a_slash_too_many_is_another_path(server: Served) -> None:
    with server.client(TOKEN) as http:
        for ask in (http.get, http.post, http.delete):
            answer = ask("/v1/exec/")
            assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")


def test_broken_requests_leave_no_connection_behind(server: Served) -> None:
    def open_files() -> int:
        return len(list(Path(f"/proc/{server.process.pid}/fd").iterdir()))

    before = open_files()
    for _ in range(20):
        with connect(server) as link:
            link.sendall(b"nonsense\r\n\r\n")
            link.recv(65536)

    assert eventually(lambda: open_files() <= before + 2)
