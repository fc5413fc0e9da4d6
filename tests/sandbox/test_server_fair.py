"""Several tokens share a server: what one has under way does not keep the others out."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from sandbox.server.load import MAX_HELD_BYTES, Load
from sandbox.server.replies import Refused
from tests.sandbox.serving import OTHER_TOKEN, TOKEN, Served, eventually, served

_TOKENS = {"RETOOL_SANDBOX_TOKEN": f"{TOKEN} {OTHER_TOKEN}"}
_SLEEP = "import time; time.sleep(1)"


@contextlib.contextmanager
def two(*options: str) -> Iterator[tuple[Served, httpx.Client, httpx.Client]]:
    """A server with two tokens, and a client of each."""
    with served(*options, env=_TOKENS) as server, server.client(TOKEN) as first, server.client(OTHER_TOKEN) as second:
        yield server, first, second


def begin(server: Served, path: str, body: Any, missing: int = 0) -> socket.socket:
    """Ask as the first token, without waiting for the answer; the last `missing` bytes do not come."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {len(data)}\r\n\r\n"
    link = socket.create_connection(server.address, timeout=30)
    link.sendall(head.encode() + data[: len(data) - missing])
    return link


def load(http: httpx.Client) -> int:
    return int(http.get("/v1/stats").json()["server"]["load"])


def test_the_batches_of_one_are_not_in_the_way_of_another() -> None:
    batch = {"items": [{"code": _SLEEP}] * 1000}
    with two("--workers", "2") as (server, first, second):
        links = [begin(server, "/v1/batch", batch)]
        assert eventually(lambda: load(second) > 900)
        links.append(begin(server, "/v1/batch", batch))
        assert eventually(lambda: load(second) > 1900)
        for fields in ({}, {"deadline_ms": 10_000}):
            began = time.monotonic()
            answer = second.post("/v1/exec", json={"code": "print(1)", **fields})
            assert answer.status_code == 200 and time.monotonic() - began < 10, answer.text
        refused = first.post("/v1/exec", json={"code": "print(1)"})
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 30 and refused.json()["error"]["retry_after"] <= 30
        for link in links:
            link.close()
        assert eventually(lambda: load(second) == 0)
        assert first.post("/v1/exec", json={"code": "print(1)"}).status_code == 200


def test_ones_own_batch_does_not_make_a_deadline_impossible() -> None:
    with two("--workers", "2") as (server, first, _), begin(server, "/v1/batch", {"items": [{"code": _SLEEP}] * 900}):
        assert eventually(lambda: load(first) > 800)
        time.sleep(3)  # until the mean time of an execution is known
        assert first.post("/v1/exec", json={"code": "print(1)", "deadline_ms": 20_000}).status_code == 200


def test_bodies_that_do_not_come_are_no_load() -> None:
    with two("--workers", "1", "--queue", "2") as (server, first, _):
        links = [begin(server, "/v1/exec", {"code": _SLEEP}, missing=1) for _ in range(12)]
        time.sleep(0.5)
        assert load(first) == 0
        assert first.post("/v1/exec", json={"code": "print(1)"}).status_code == 200
        for link in links:
            link.close()


def test_work_that_goes_on_without_its_client_counts_as_its_owners() -> None:
    with two("--workers", "1", "--queue", "3", "--wall", "30") as (server, first, second):
        for number in range(4):
            code = "import time; time.sleep(2)"
            with begin(server, "/v1/exec", {"code": code, "idempotency_key": f"k{number}"}):
                assert eventually(lambda: load(second) == number + 1)  # noqa: B023
        assert eventually(lambda: second.get("/v1/stats").json()["server"]["detached"] == 4)
        assert first.post("/v1/exec", json={"code": "print(1)"}).status_code == 429
        assert second.post("/v1/exec", json={"code": "print(1)"}).status_code == 200
        assert eventually(lambda: load(second) == 0)


def test_sandboxfusions_endpoints_take_turns_too() -> None:
    with two("--workers", "1", "--queue", "50") as (server, _, second):
        run = {"code": _SLEEP, "language": "python"}
        links = [begin(server, "/run_code", run) for _ in range(20)]
        assert eventually(lambda: load(second) == 20)
        began = time.monotonic()
        assert second.post("/run_code", json={"code": "print(1)", "language": "python"}).json()["status"] == "Success"
        assert time.monotonic() - began < 8
        for link in links:
            link.close()


def test_a_load_has_a_place_for_everybody_until_all_are_taken() -> None:
    load = Load(workers=2, queue=3)
    for number in range(8):
        for _ in range(5):
            load.check(f"owner {number}")
            load.enter(f"owner {number}")
        with pytest.raises(Refused, match="5 executions of yours"):
            load.check(f"owner {number}")
    with pytest.raises(Refused, match="40 executions"):
        load.check("another")
    load.leave("owner 0")
    load.check("another")
    load.later("another", 5)
    with pytest.raises(Refused, match="of yours"):
        load.check("another")
    assert load.total == 44


def test_an_expected_wait_is_that_of_owners_who_take_turns() -> None:
    load = Load(workers=2, queue=1000)
    for _ in range(200):
        load.took(1.0)
    assert load.expected_wait("b") == 0
    for _ in range(100):
        load.enter("a")
    assert 0 < load.expected_wait("b") < 1 and 40 < load.expected_wait("a") < 60
    load.later("a", 1000)
    with pytest.raises(Refused) as refused:
        load.check("a")
    assert refused.value.wait == 30


def test_one_owner_cannot_fill_the_memory() -> None:
    load = Load(workers=1, queue=1)
    load.hold("a", MAX_HELD_BYTES // 2)
    with pytest.raises(Refused, match="in memory"):
        load.hold("a", 1000)
    load.hold("b", MAX_HELD_BYTES // 2 - 1000)
    with pytest.raises(Refused):
        load.hold("b", 500)
    load.hold("a", -MAX_HELD_BYTES // 2)
    load.hold("b", 500)
