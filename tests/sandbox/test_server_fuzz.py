"""Nothing that a client can send makes the server fail: never a 5xx, always JSON."""

from __future__ import annotations

import base64
import json
import socket
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sandbox.server.routes import ROUTES
from tests.sandbox.serving import Served, served

_SETTINGS = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
_POSTS = sorted({route.path for route in ROUTES if route.method == "POST"})
_ALL = sorted({(route.method, route.path) for route in ROUTES})
_SURROGATES = st.text(st.characters(codec=None, categories=None), max_size=20)
_TEXT = st.one_of(
    st.text(max_size=20), _SURROGATES, st.sampled_from(["\x00", "\ud800", "a/../b", "../x", "é" * 300, "-rf"])
)
_NUMBER = st.one_of(
    st.integers(), st.floats(allow_nan=False), st.sampled_from([2**63, -(2**63), 10**400, 1e308, -0.0, 0.001, 1e-320])
)
_JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), _NUMBER, _TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(_TEXT, inner, max_size=4)),
    max_leaves=8,
)
_LIMITS = st.fixed_dictionaries(
    {},
    optional={
        "wall_s": st.one_of(_NUMBER, st.just(1.0)),
        "memory_mb": _NUMBER,
        "output_head_bytes": _NUMBER,
        "processes": _NUMBER,
        "nonsense": _JSON,
    },
)
_B64 = st.one_of(st.binary(max_size=20).map(lambda data: base64.b64encode(data).decode()), _TEXT)
_FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "code": st.one_of(st.sampled_from(["print(1)", "x", "1/0", "\ud83d", "\x00"]), _TEXT, _JSON),
    "stdin": st.one_of(_TEXT, _JSON),
    "files": st.one_of(st.dictionaries(_TEXT, _B64, max_size=3), _JSON),
    "fetch": st.one_of(st.lists(_TEXT, max_size=3), _JSON),
    "limits": st.one_of(_LIMITS, _JSON),
    "seed": st.one_of(_NUMBER, _JSON),
    "profile": st.one_of(st.sampled_from(["py-bare", "auto", "nope"]), _JSON),
    "rich": st.one_of(st.booleans(), _JSON),
    "deadline_ms": st.one_of(_NUMBER, _JSON),
    "idempotency_key": st.one_of(st.text(st.characters(min_codepoint=33, max_codepoint=126), max_size=9), _JSON),
    "items": st.one_of(st.lists(_JSON, max_size=3), _JSON),
    "language": st.one_of(st.sampled_from(["python", "bash", "pytest", "cpp"]), _JSON),
    "run_timeout": st.one_of(st.just(2), _NUMBER, _JSON),
    "memory_limit_MB": st.one_of(st.just(-1), _NUMBER, _JSON),
    "fetch_files": st.one_of(st.lists(_TEXT, max_size=3), _JSON),
    "cells": st.one_of(st.lists(_TEXT, max_size=3), _JSON),
    "count": _NUMBER,
    "seeds": st.one_of(st.lists(_NUMBER, max_size=3), _JSON),
    "snapshot": _JSON,
    "expect_step": _NUMBER,
    "ttl_s": _NUMBER,
}
_BODY = st.fixed_dictionaries({}, optional=_FIELDS)


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--wall", "2", "--max-wall", "3", "--workers", "2") as it:
        yield it


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def session(http: httpx.Client) -> str:
    return str(http.post("/v1/sessions", json={}).json()["id"])


def check(answer: httpx.Response) -> None:
    assert answer.status_code < 500, f"{answer.request.url}: {answer.status_code} {answer.text[:500]}"
    kind = answer.headers["content-type"]
    if kind.startswith("application/x-ndjson"):
        for line in answer.text.splitlines():
            row = json.loads(line)
            assert row["http_status"] < 500, row
            assert ("result" in row) != ("error" in row)
    elif answer.status_code >= 400:
        error = json.loads(answer.content)["error"]
        assert {"code", "message", "retryable", "class"} <= set(error)
    elif kind.startswith("application/json"):
        json.loads(answer.content)


def fill(path: str, ident: str, name: str) -> str:
    path = path.replace("{session}", ident).replace("{snapshot}", ident).replace("{path:anything}", name)
    return path


@_SETTINGS
@given(path=st.sampled_from(["/v1/exec", "/v1/batch", "/run_code", "/run_jupyter"]), body=_BODY)
def test_any_fields(http: httpx.Client, path: str, body: dict[str, Any]) -> None:
    if path == "/v1/exec" or path == "/run_code":
        body = {"code": "print(1)", "language": "python", **body}
        if path == "/v1/exec":
            for name in set(body) - {"code", "stdin", "files", "fetch", "limits", "seed", "rich", "deadline_ms"}:
                del body[name]
    check(http.post(path, content=json.dumps(body)))


@_SETTINGS
@given(path=st.sampled_from(_POSTS), body=_BODY)
def test_any_fields_anywhere(http: httpx.Client, session: str, path: str, body: dict[str, Any]) -> None:
    check(http.post(fill(path, session, "x"), content=json.dumps(body)))


@_SETTINGS
@given(path=st.sampled_from(_POSTS), value=_JSON)
def test_any_json(http: httpx.Client, session: str, path: str, value: Any) -> None:
    check(http.post(fill(path, session, "x"), content=json.dumps(value)))


@_SETTINGS
@given(
    where=st.sampled_from([pair for pair in _ALL if pair != ("DELETE", "/v1/sessions/{session}")]),
    body=st.binary(max_size=200),
    kind=st.sampled_from(["application/json", "text/plain", "multipart/form-data; boundary=x", "\x80"]),
)
def test_any_bytes(http: httpx.Client, session: str, where: tuple[str, str], body: bytes, kind: str) -> None:
    method, path = where
    check(
        http.request(method, fill(path, session, "x"), content=body, headers={"Content-Type": kind.encode("latin-1")})
    )


@_SETTINGS
@given(ident=st.text(max_size=40), name=st.binary(max_size=40), method=st.sampled_from(["GET", "PUT", "DELETE"]))
def test_any_path(http: httpx.Client, session: str, ident: str, name: bytes, method: str) -> None:
    quoted = quote(name, safe="/")
    check(http.request(method, f"/v1/sessions/{session}/files/{quoted}", content=b"data"))
    check(http.get(f"/v1/sessions/{quote(ident, safe='')}/files"))
    check(http.get(f"/v1/snapshots/{quote(ident, safe='')}/restore"))


def test_files_with_odd_names_go_in_and_out(http: httpx.Client, session: str) -> None:
    for name in (b"new\nline", b"a b", b"\xff\xfe", b"-rf", b"x?y#z", "é/ü".encode(), b"a%2Fb", b"x" * 255):
        path = f"/v1/sessions/{session}/files/{quote(name)}"
        assert http.put(path, content=name[::-1]).status_code == 200, name
        assert http.get(path).content == name[::-1]
    listed = [
        row["path"].encode("utf-8", "surrogateescape") for row in http.get(path.rsplit("/", 1)[0]).json()["files"]
    ]
    assert {b"new\nline", b"\xff\xfe", b"a%2Fb"} <= set(listed)
    for bad in ("../x", "/etc/passwd", "a/../../b", "%00", "x" * 256, ""):
        answer = http.get(f"/v1/sessions/{session}/files/{bad.replace('.', '%2E')}")
        assert answer.json()["error"]["code"] in ("bad_path", "no_file"), bad


@pytest.mark.parametrize(
    "head",
    [
        b"POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999999999999999999\r\n\r\n",
        b"POST /v1/exec HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /v1/sessions/%ff%00/files/%ff HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
        b"POST /v1/exec HTTP/1.1\r\nHost: x\r\nContent-Length: 40000000\r\nExpect: 100-continue\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00",
    ],
)
def test_broken_http_is_refused_and_the_server_lives(server: Served, http: httpx.Client, head: bytes) -> None:
    with socket.create_connection(server.address, timeout=10) as link:
        link.sendall(head)
        link.shutdown(socket.SHUT_WR)
        answer = link.recv(65536)
    assert not answer or answer.split()[1][:1] in (b"2", b"4"), answer
    assert http.post("/v1/exec", json={"code": "print(1)"}).json()["stdout"] == "1\n"
