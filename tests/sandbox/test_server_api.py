"""The native API of a real server, over HTTP."""

from __future__ import annotations

import base64
import contextlib
import inspect
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from retool.cli import sandbox_serve
from tests.sandbox.serving import ROOT, Served, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served("--queue", "50", "--wall", "10", "--max-wall", "20", profile="py-math") as it:
        yield it


@pytest.fixture(scope="module")
def http(server: Served) -> Iterator[httpx.Client]:
    with server.client() as client:
        yield client


def run(http: httpx.Client, code: str, **fields: Any) -> dict[str, Any]:
    answer = http.post("/v1/exec", json={"code": code, **fields})
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def refusal(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    error = dict(answer.json()["error"])
    assert error["code"] == code and error["message"] and isinstance(error["retryable"], bool) and error["class"]
    return error


def test_every_way_that_code_can_end_is_200(http: httpx.Client) -> None:
    assert run(http, "print(2**10)") | {"usage": 0, "digest": 0} == {
        **run(http, "print(1024)"),
        "usage": 0,
        "digest": 0,
    }
    failed = run(http, "1/0")
    assert (failed["status"], failed["exception"]["type"]) == ("error", "ZeroDivisionError")
    assert run(http, "import sys; sys.exit(3)")["exit_code"] == 3
    slow = run(http, "print('partial', flush=True)\nwhile True: pass", limits={"wall_s": 0.3})
    assert (slow["status"], slow["stdout"]) == ("timeout", "partial\n")
    flood = run(http, "while True: print('x' * 1000)", limits={"output_kill_bytes": 20_000})
    assert flood["status"] == "output_limit"
    assert run(http, "import os; os.abort()")["signal"] == 6
    assert run(http, "bytearray(10**9)", limits={"memory_mb": 64})["status"] == "memory_limit"


def test_everything_that_a_request_can_ask_for_arrives(http: httpx.Client) -> None:
    result = run(
        http,
        "import sys, random, numpy\nopen('out.bin', 'wb').write(open('in/a.txt', 'rb').read()[::-1])\n"
        "print(sys.stdin.read(), random.random(), numpy.random.rand())\n6 * 7",
        stdin="hello",
        seed=5,
        files={"in/a.txt": base64.b64encode(b"\x00\xff01").decode()},
        fetch=["out.bin", "missing"],
        rich=True,
        profile="py-math",
        deadline_ms=60_000,
    )
    assert result["status"] == "ok", result
    assert base64.b64decode(result["files"]["out.bin"]) == b"10\xff\x00" and len(result["files"]) == 1
    assert result["display"] == [{"text/plain": "42"}]
    assert result["stdout"].startswith("hello 0.62290169")
    assert result["isolation"] in ("ns", "uid", "self") and result["profile"] == "py-math"


def test_output_with_lone_surrogates_is_valid_json(http: httpx.Client) -> None:
    answer = http.post("/v1/exec", json={"code": "import sys; sys.stdout.buffer.write(b'\\xff\\xed\\xa0\\x80')"})
    assert answer.content.isascii() and json.loads(answer.content)["status"] == "ok"


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"", 422, "invalid_json"),
        (b"{", 422, "invalid_json"),
        (b"\xff\xfe", 422, "invalid_json"),
        (b'{"code": NaN}', 422, "invalid_json"),
        (b"[" * 100_000, 422, "invalid_json"),
        (b'{"code": ' + b"9" * 10_000 + b"}", 422, "invalid_json"),
        (b"[]", 422, "invalid_request"),
        (b'{"code": 1}', 422, "invalid_request"),
        (b'{"code": "1", "Code": "2"}', 422, "invalid_request"),
        (b'{"code": "1", "files": {"a": "not base64!"}}', 422, "invalid_request"),
        (b'{"code": "1", "limits": {"wall_s": -1}}', 422, "invalid_request"),
        (b'{"code": "1", "limits": {"wall_s": 1e400}}', 422, "invalid_request"),
        (b'{"code": "1", "limits": {"wall_s": 21}}', 422, "invalid_request"),
        (b'{"code": "1", "limits": {"memory_mb": 9999999}}', 422, "invalid_request"),
        (b'{"code": "1", "limits": {"network": true}}', 422, "invalid_request"),
        (b'{"code": "1", "seed": "1"}', 422, "invalid_request"),
        (b'{"code": "1", "profile": "no-such-profile"}', 422, "invalid_request"),
        (b'{"code": "1", "idempotency_key": "has blank"}', 422, "invalid_request"),
        (b'{"code": "\\ud800"}', 422, "rejected"),
    ],
)
def test_what_is_refused_before_it_runs(http: httpx.Client, body: bytes, status: int, code: str) -> None:
    error = refusal(http.post("/v1/exec", content=body), status, code)
    assert not error["retryable"] and error["class"] == "request"


def test_code_that_is_too_large_is_rejected_with_its_result(http: httpx.Client) -> None:
    answer = http.post("/v1/exec", json={"code": "#" * 2000, "limits": {"code_bytes": 1000}})
    refusal(answer, 422, "rejected")
    assert answer.json()["status"] == "rejected"


def test_a_path_that_leaves_the_work_folder_is_refused(http: httpx.Client) -> None:
    for fields in ({"files": {"../x": ""}}, {"files": {"/etc/x": ""}}, {"fetch": ["../../etc/passwd"]}):
        answer = http.post("/v1/exec", json={"code": "1", **fields})
        assert answer.status_code == 422 and answer.json()["error"]["class"] in ("request", "session")


def test_a_body_that_is_too_large_is_refused_however_it_comes(server: Served, http: httpx.Client) -> None:
    big = b'{"code": "' + b"#" * (33 * 1024 * 1024) + b'"}'
    try:
        answer = http.post("/v1/exec", content=big)
    except httpx.WriteError:  # it was refused while we were still sending
        answer = None
    assert answer is None or refusal(answer, 413, "too_large")
    sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal sent
        for _ in range(64):
            sent += 1024 * 1024
            yield b" " * 1024 * 1024

    with server.client() as other, contextlib.suppress(httpx.WriteError):
        refusal(other.post("/v1/exec", content=pieces()), 413, "too_large")
    assert sent > 32 * 1024 * 1024
    assert run(http, "print(1)")["stdout"] == "1\n"
    code = "x = '" + "é" * (6 * 1024 * 1024) + "'\nprint(len(x))"
    large = run(http, code, limits={"code_bytes": 16 * 1024 * 1024, "memory_mb": 2048, "file_mb": 64})
    assert large["stdout"] == "6291456\n", "twelve megabytes are fine"


def test_a_batch_is_streamed_as_items_finish(http: httpx.Client) -> None:
    slow = "import time; time.sleep(1.5); print('slow')"
    items: list[Any] = [{"code": slow}, *({"code": f"print({n})"} for n in range(1, 20)), {"code": 7}, "x"]
    items.append({"code": "\ud800"})
    with http.stream("POST", "/v1/batch", content=json.dumps({"items": items})) as answer:
        assert answer.status_code == 200
        lines = [json.loads(line) for line in answer.iter_lines()]
    assert sorted(line["index"] for line in lines) == list(range(len(items)))
    by_index = {line["index"]: line for line in lines}
    assert all(by_index[n]["result"]["stdout"] == f"{n}\n" for n in range(1, 20))
    assert by_index[20]["error"]["code"] == by_index[21]["error"]["code"] == "invalid_request"
    assert by_index[22]["http_status"] == 422 and by_index[22]["result"]["status"] == "rejected"
    assert [line["index"] for line in lines].index(0) > len(items) // 2, "the slow one does not hold up the others"


def test_a_batch_has_a_bounded_number_of_items(http: httpx.Client) -> None:
    for items in ([], [{"code": "1"}] * 1001):
        refusal(http.post("/v1/batch", json={"items": items}), 422, "invalid_request")


def test_a_key_runs_once_and_belongs_to_one_request(http: httpx.Client) -> None:
    fields = {"code": "import time; print(time.time_ns())", "idempotency_key": "k-1"}
    first = http.post("/v1/exec", json=fields)
    assert http.post("/v1/exec", json=fields).content == first.content
    header = http.post("/v1/exec", json={"code": fields["code"]}, headers={"Idempotency-Key": "k-1"})
    assert header.content == first.content
    with http.stream("POST", "/v1/batch", json={"items": [fields]}) as answer:
        assert json.loads(answer.read())["result"] == first.json()
    assert http.post("/v1/exec", json={**fields, "idempotency_key": "k-2"}).content != first.content
    refusal(http.post("/v1/exec", json={**fields, "code": "other"}), 409, "idempotency_conflict")
    blank = http.post("/v1/exec", json={"code": "1"}, headers={"Idempotency-Key": "a b"})
    refusal(blank, 422, "invalid_request")
    assert blank.json()["error"]["message"].startswith("Idempotency-Key: ")


def test_unknown_paths_and_methods_are_json_too(http: httpx.Client) -> None:
    refusal(http.get("/nope"), 404, "not_found")
    refusal(http.get("/v1/exec"), 405, "method_not_allowed")
    refusal(http.patch("/v1/exec"), 405, "method_not_allowed")
    refusal(http.get("/v1/sessions/" + "0" * 32), 404, "no_session")
    refusal(http.post("/v1/sessions/" + "0" * 32 + "/exec", json={"code": "1"}), 404, "no_session")
    refusal(http.delete("/v1/snapshots/x"), 404, "no_snapshot")
    refusal(http.get("/v1/sessions/x/exec"), 405, "method_not_allowed")
    for path in ("/v1/sessions//exec", "/v1/sessions/x/nope", "/v1/sessions/a%2Fb/exec", "/v2/sessions/x/exec"):
        refusal(http.post(path, json={"code": "1"}), 404, "not_found")


def test_health_is_an_execution_and_cannot_be_used_to_overload(http: httpx.Client) -> None:
    def executions() -> int:
        return int(http.get("/v1/stats").json()["executions"])

    before = executions()
    assert {http.get("/healthz").json()["status"] for _ in range(50)} == {"ok"}
    assert executions() - before <= 25, "probes share an execution"
    assert http.get("/readyz").json()["status"] == "ready"


def test_capabilities_metrics_and_openapi(server: Served, http: httpx.Client) -> None:
    run(http, "1/0")
    capable = http.get("/v1/capabilities").json()
    assert capable["tier"] in server.line and capable["limits"]["wall_s"] == 10
    assert capable["server"]["queue"] == 50
    text = http.get("/metrics").text
    for name in (
        'executions_total{status="error"}',
        "exec_seconds_bucket",
        "queue_depth",
        "leaked 0.0",
        f'info{{profile="py-math",tier="{capable["tier"]}"}} 1.0',
        "supervisor_restarts 0.0",
        "sessions ",
    ):
        assert f"retool_sandbox_{name}" in text, name
    page = http.get("/openapi.json").json()
    assert page["paths"]["/v1/exec"]["post"]["requestBody"]["content"]["application/json"]["examples"]
    for path, operations in page["paths"].items():
        for operation in operations.values():
            assert operation["responses"]["429"], path
    names = set(page["components"]["schemas"])
    used = {part.split('"')[0] for part in json.dumps(page).split("#/components/schemas/")[1:]}
    assert used <= names
    assert http.get("/docs").status_code == 200
    answer = page["paths"]["/v1/ping"]["get"]["responses"]["200"]["content"]["application/json"]["schema"]["$ref"]
    assert page["components"]["schemas"][answer.rsplit("/", 1)[1]] == {"type": "string"}
    for path, operations in page["paths"].items():
        for operation in operations.values():
            body = json.dumps(operation.get("requestBody", {})).split("#/components/schemas/")
            model = page["components"]["schemas"][body[1].split('"')[0]] if len(body) > 1 else {}
            takes = any(parameter["name"] == "Idempotency-Key" for parameter in operation["parameters"])
            assert takes == ("idempotency_key" in model.get("properties", {})), path


def test_a_stored_result_is_no_execution(http: httpx.Client) -> None:
    def executions() -> float:
        lines = http.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith("retool_sandbox_executions_total{"))

    path = f"/v1/sessions/{http.post('/v1/sessions', json={}).json()['id']}"
    snapshot = http.post(f"{path}/snapshot").json()["snapshot"]
    before = executions()
    for _ in range(5):
        answer = http.post(f"{path}/exec", json={"code": "print(1)", "expect_step": 1})
        assert (answer.json()["stdout"], answer.json()["step"]) == ("1\n", 1)
    assert executions() == before + 1
    assert http.post(f"{path}/restore", json={"snapshot": snapshot}).status_code == 200
    assert http.post(f"{path}/exec", json={"code": "print(2)", "expect_step": 1}).json()["stdout"] == "2\n"
    assert http.post(f"{path}/exec", content=b'{"code": "\\ud800"}').status_code == 422
    assert executions() == before + 3
    http.delete(path)


def test_the_documentation_names_every_option() -> None:
    text = (ROOT / "docs" / "sandbox-api.md").read_text()
    for name in inspect.signature(sandbox_serve).parameters:
        assert f"`--{name.replace('_', '-')}" in text, name


@pytest.mark.parametrize("characters", [10, 5_000, 60_000])
def test_a_stored_answer_is_the_first_one_to_the_byte(http: httpx.Client, characters: int) -> None:
    code = (
        f"import random, time; print(time.time_ns(), ''.join(map(chr, random.choices(range(1, 900), k={characters}))))"
    )
    fields = {"code": code, "idempotency_key": f"stored-{characters}"}
    first, again = (http.post("/v1/exec", json=fields) for _ in range(2))
    assert first.json()["status"] == "ok" and again.content == first.content
    for answer in (first, again):
        del answer.headers["date"]  # of the answer, not of what is stored
    assert again.headers == first.headers
