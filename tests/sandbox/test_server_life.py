"""A server's life: who may come in, overload, clients that leave, the death of its supervisor, its own end."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandbox.server.options import ServeError, ServeOptions
from sandbox.server.owners import Owners
from sandbox.server.tokens import Tokens, load_tokens
from sandbox.types import SessionError
from tests.sandbox.conftest import processes
from tests.sandbox.serving import OTHER_TOKEN, ROOT, TOKEN, Served, eventually, served

_SLEEP = "import time; time.sleep(30)"


def stats(http: httpx.Client) -> dict[str, Any]:
    return dict(http.get("/v1/stats").json())


def exec_(http: httpx.Client, code: str, **fields: Any) -> httpx.Response:
    return http.post("/v1/exec", json={"code": code, **fields})


# --- tokens ----------------------------------------------------------------------------------------------------------


def descendants(pid: int) -> list[int]:
    found = [pid]
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rsplit(") ", 1)[1].split()[1])
            except (OSError, IndexError):
                continue
            if parent == pid:
                found += descendants(int(entry.name))
    return found


def test_a_token_is_needed_and_goes_nowhere(tmp_path: Path) -> None:
    file = tmp_path / "tokens"
    file.write_text(f"# two users\n{TOKEN}\n\n")
    with served("--host", "0.0.0.0", "--token-file", str(file), env={"RETOOL_SANDBOX_TOKEN": OTHER_TOKEN}) as server:
        server.url = server.url.replace("0.0.0.0", "127.0.0.1")
        with server.client() as anybody, server.client(TOKEN) as first, server.client(OTHER_TOKEN) as second:
            for path in ("/v1/stats", "/metrics", "/v1/capabilities", "/nope", "/openapi.json"):
                answer = anybody.get(path)
                assert answer.status_code == 401 and answer.json()["error"]["class"] == "auth", path
                assert answer.headers["www-authenticate"] == "Bearer"
            assert anybody.get("/healthz").status_code == anybody.get("/readyz").status_code == 200
            assert exec_(anybody, "1").status_code == 401
            with server.client("0123456789abcdef-third") as wrong:
                assert exec_(wrong, "1").status_code == 401
            seen = exec_(first, "import os; print(dict(os.environ))").json()["stdout"]
            session = first.post("/v1/sessions", json={}).json()["id"]
            assert len(session) == 32
            for call in (
                second.get(f"/v1/sessions/{session}"),
                second.post(f"/v1/sessions/{session}/exec", json={"code": "1"}),
                second.get(f"/v1/sessions/{session}/files"),
                second.delete(f"/v1/sessions/{session}"),
            ):
                assert (call.status_code, call.json()["error"]["code"]) == (404, "no_session")
            snapshot = first.post(f"/v1/sessions/{session}/snapshot").json()["snapshot"]
            assert second.post(f"/v1/snapshots/{snapshot}/restore").json()["error"]["code"] == "no_snapshot"
            assert second.delete(f"/v1/snapshots/{snapshot}").json()["error"]["code"] == "no_snapshot"
            keyed = {"code": "import os; print(os.urandom(8).hex())", "idempotency_key": "same"}
            assert (
                first.post("/v1/exec", json=keyed).json()["stdout"]
                != second.post("/v1/exec", json=keyed).json()["stdout"]
            )
            below = descendants(server.process.pid)[1:]
            assert len(below) >= 2
            environments = [Path(f"/proc/{pid}/environ").read_bytes() for pid in below]
        for secret in (TOKEN, OTHER_TOKEN):
            assert secret not in seen
            assert all(secret.encode() not in environment for environment in environments)


@pytest.mark.parametrize(
    ("options", "env", "words"),
    [
        (["--host", "0.0.0.0"], {}, "token"),
        (["--token-file", "/no/such/file"], {}, "/no/such/file"),
        ([], {"RETOOL_SANDBOX_TOKEN": "short"}, "16 or more"),
        (["--tier", "bogus"], {}, "bogus"),
        (["--profile", "bogus"], {}, "bogus"),
        (["--require", "bogus"], {}, "bogus"),
        (["--host", "256.1.1.1", "--token-file", "TOKENS"], {}, "256.1.1.1"),
        (["--uds", "/no/such/folder/socket"], {}, "/no/such/folder/socket"),
        (["--uds", "TOKENS"], {}, "something else that is no socket"),
        (["--wall", "10", "--max-wall", "5"], {}, "exceed"),
    ],
)
def test_what_cannot_be_served_is_said_in_a_line(
    tmp_path: Path, options: list[str], env: dict[str, str], words: str
) -> None:
    tokens = tmp_path / "tokens"
    tokens.write_text(TOKEN)
    options = [str(tokens) if option == "TOKENS" else option for option in options]
    command = [sys.executable, "-m", "retool", "sandbox", "serve", "--port", "0", *options]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, **env}, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr and words in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--host", "x" * 300], "--host xxx"),
        (["--host", "ü..x"], "--host ü..x"),
        (["--port", "99999"], "99999"),
        (["--port", "-1"], "-1"),
        (["--uds", ""], "--uds"),
        (["--queue", "-1"], "--queue"),
    ],
)
def test_nonsense_is_refused_in_a_line(options: list[str], words: str) -> None:
    command = [sys.executable, "-m", "sandbox.server", *options]
    env = {**os.environ, "RETOOL_SANDBOX_TOKEN": TOKEN}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and words in done.stderr, done.stderr


@pytest.mark.parametrize("mode", [-1, 0o1000, 0o1777])
def test_a_sockets_mode_is_permissions(tmp_path: Path, mode: int) -> None:
    with pytest.raises(ServeError, match="--uds-mode"):
        ServeOptions(uds=str(tmp_path / "socket"), uds_mode=mode).check(())
    ServeOptions(uds=str(tmp_path / "socket"), uds_mode=0o777).check(())


def test_a_port_in_use_is_said_in_a_line() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        command = [sys.executable, "-m", "sandbox.server", "--port", str(taken.getsockname()[1])]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2 and "already in use" in done.stderr.lower() and "Traceback" not in done.stderr


def test_tokens_are_read_with_care(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RETOOL_SANDBOX_TOKEN", f"{TOKEN}, {OTHER_TOKEN}")
    assert load_tokens(None) == (TOKEN, OTHER_TOKEN)
    assert "RETOOL_SANDBOX_TOKEN" not in os.environ
    tokens = Tokens([TOKEN, OTHER_TOKEN])
    owners = {tokens.owner(f"Bearer {token}".encode()) for token in (TOKEN, OTHER_TOKEN)}
    assert len(owners) == 2 and None not in owners
    for wrong in (None, b"", b"Bearer", b"Bearer ", TOKEN.encode(), b"Basic " + TOKEN.encode(), b"Bearer \xff"):
        assert tokens.owner(wrong) is None
    empty = tmp_path / "empty"
    empty.write_text("# nothing\n")
    with pytest.raises(ValueError, match="holds no token"):
        load_tokens(str(empty))


def test_a_unix_socket_is_for_its_user_only(tmp_path: Path) -> None:
    path = tmp_path / "box.sock"
    for _ in range(2):  # the second time a stale file of a killed server lies there
        server = Served("--uds", str(path))
        assert path.stat().st_mode & 0o777 == 0o600
        with httpx.Client(transport=httpx.HTTPTransport(uds=str(path)), base_url="http://sandbox") as http:
            assert exec_(http, "print(1)").json()["stdout"] == "1\n"
        server.process.kill()
        server.end()
    server = Served("--uds", str(path))
    assert server.end()[0] == 0 and not path.exists()


def test_forgotten_snapshots_take_no_memory() -> None:
    owners = Owners(max_snapshots=3)
    owners.add_snapshot("a", "first", 7)
    for number in range(1000):
        owners.add_snapshot("a", str(number), number)
        assert owners.snapshot("a", "first") == 7, "what is used stays"
    kept = 0
    for number in range(1000):
        with contextlib.suppress(SessionError):
            kept += owners.snapshot("a", str(number)) == number
    assert 3 <= kept + 1 <= 6


# --- load ------------------------------------------------------------------------------------------------------------


def test_what_does_not_fit_is_429_and_the_rest_is_done() -> None:
    with served("--workers", "1", "--queue", "4") as server, server.client() as http:
        code = "import time; time.sleep(0.15); print('done')"
        with concurrent.futures.ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(lambda _: exec_(http, code), range(40)))
        codes = {answer.status_code for answer in answers}
        assert codes == {200, 429}
        for answer in answers:
            if answer.status_code == 200:
                assert answer.json()["stdout"] == "done\n"
            else:
                error = answer.json()["error"]
                assert (error["code"], error["class"], error["retryable"]) == ("overloaded", "overload", True)
                assert int(answer.headers["retry-after"]) >= 1 and error["retry_after"] > 0
        assert eventually(lambda: stats(http)["server"]["load"] == 0)
        assert (
            f'refused_total{{code="overloaded"}} {sum(a.status_code == 429 for a in answers)}'
            in http.get("/metrics").text
        )


def test_a_deadline_that_cannot_be_met_is_429() -> None:
    with (
        served("--workers", "1", "--queue", "50") as server,
        server.client() as http,
        concurrent.futures.ThreadPoolExecutor(12) as pool,
    ):
        slow = [pool.submit(exec_, http, "import time; time.sleep(0.5)") for _ in range(8)]
        assert eventually(lambda: stats(http)["server"]["load"] == 8)
        started = time.monotonic()
        late = exec_(http, "print(1)", deadline_ms=200)
        assert late.status_code == 429 and time.monotonic() - started < 3
        assert exec_(http, "print(1)", deadline_ms=60_000).status_code == 200
        assert {each.result().status_code for each in slow} == {200}


def test_health_under_full_load_is_not_failure() -> None:
    with (
        served("--workers", "1", "--queue", "1") as server,
        server.client() as http,
        concurrent.futures.ThreadPoolExecutor(4) as pool,
    ):
        busy = [pool.submit(exec_, http, "import time; time.sleep(3)") for _ in range(2)]
        assert eventually(lambda: stats(http)["server"]["load"] == 2)
        time.sleep(1.2)
        assert http.get("/healthz").status_code == 200
        assert {each.result().status_code for each in busy} == {200}


# --- clients that leave ----------------------------------------------------------------------------------------------


def leave(server: Served, body: dict[str, Any], path: str = "/v1/exec") -> None:
    """Ask, and hang up once the execution runs."""
    data = json.dumps(body).encode()
    with server.client() as watch, socket.create_connection(server.address) as link:
        running = stats(watch)["running"]
        link.sendall(b"POST %s HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % (path.encode(), len(data)) + data)
        assert eventually(lambda: stats(watch)["running"] > running)


def test_a_client_that_leaves_ends_its_execution_unless_it_has_a_key() -> None:
    with served("--wall", "30") as server, server.client() as http:
        for path, body in (
            ("/v1/exec", {"code": _SLEEP}),
            ("/run_code", {"code": _SLEEP, "language": "python", "run_timeout": 30}),
            ("/v1/batch", {"items": [{"code": _SLEEP}]}),
        ):
            done = stats(http).get("executions", 0)
            leave(server, body, path)
            assert eventually(lambda: stats(http)["running"] == 0), path
            assert eventually(lambda: stats(http)["server"]["load"] == 0), path
            assert eventually(lambda: stats(http)["executions"] == done + 1), path  # noqa: B023
        keyed = {"code": "import time; time.sleep(1.5); print(time.time_ns())", "idempotency_key": "mine"}
        before = stats(http)["executions"]
        leave(server, keyed)
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda _: http.post("/v1/exec", json=keyed), range(8)))
        assert {answer.status_code for answer in answers} == {200}
        assert len({answer.content for answer in answers}) == 1
        assert stats(http)["executions"] == before + 1, "once, whoever asked"


def test_a_client_that_leaves_does_not_cut_off_what_its_session_does() -> None:
    with served("--wall", "30") as server, server.client() as http:
        path = f"/v1/sessions/{http.post('/v1/sessions', json={}).json()['id']}/exec"
        data = json.dumps({"code": "import time; time.sleep(1); x = 41"}).encode()
        with socket.create_connection(server.address) as link:
            head = f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(data)}\r\n\r\n"
            link.sendall(head.encode() + data)
            assert eventually(lambda: stats(http)["server"]["load"] == 1)
        assert http.post(path, json={"code": "1"}).json()["error"]["code"] == "busy"
        assert eventually(lambda: stats(http)["server"]["load"] == 0)
        answer = http.post(path, json={"code": "x + 1"}).json()
        assert (answer["stdout"], answer["step"]) == ("42\n", 2)


# --- deaths ----------------------------------------------------------------------------------------------------------


def test_the_supervisors_death_is_a_typed_failure_and_the_retry_works() -> None:
    with served("--workers", "3", "--wall", "30") as server, server.client() as http:
        session = http.post("/v1/sessions", json={}).json()["id"]
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            lost = [pool.submit(exec_, http, _SLEEP, idempotency_key=f"k{n}") for n in range(6)]
            assert eventually(lambda: stats(http)["running"] == 3)
            supervisor = stats(http)["supervisor_pid"]
            os.kill(supervisor, signal.SIGKILL)
            for each in lost:
                answer = each.result()
                error = answer.json()["error"]
                assert answer.status_code == 503 and error["retryable"] and error["class"] == "infrastructure", error
                assert int(answer.headers["retry-after"]) == error["retry_after"] == 1
            again = list(pool.map(lambda n: exec_(http, f"print({n})", idempotency_key=f"r{n}"), range(6)))
        assert [answer.json()["stdout"] for answer in again] == [f"{n}\n" for n in range(6)]
        assert exec_(http, "print('k0')", idempotency_key="k0").json()["stdout"] == "k0\n", "a failure is not kept"
        gone = http.post(f"/v1/sessions/{session}/exec", json={"code": "1"})
        assert (gone.status_code, gone.json()["error"]["code"]) == (410, "session_ended")
        assert http.get("/healthz").status_code == 200
        counted = http.get("/metrics").text
        assert "retool_sandbox_supervisor_restarts 1.0" in counted
        assert 'retool_sandbox_infra_errors_total{code="unavailable"}' in counted


def test_a_killed_server_leaves_nothing_behind() -> None:
    server = Served("--wall", "30")
    with server.client() as http:
        thread = threading.Thread(target=_ignore_the_end, args=(http,))
        thread.start()
        assert eventually(lambda: stats(http)["running"] == 1)
        below = descendants(server.process.pid)
        assert len(below) > 2
        server.process.kill()
        thread.join()
    server.end()
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))
    assert not processes(f'"client_pid": {server.process.pid},')


def _ignore_the_end(http: httpx.Client) -> None:
    try:
        exec_(http, _SLEEP)
    except httpx.HTTPError:
        return


def test_a_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    server = Served("--drain", "20")
    with server.client() as http, server.client() as second:
        second.get("/readyz")
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            running = pool.submit(exec_, http, "import time; time.sleep(2); print('finished')")
            assert eventually(lambda: stats(second)["running"] == 1)
            server.terminate()
            assert eventually(lambda: second.get("/readyz").status_code == 503)
            refused = exec_(second, "print(1)")
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert refused.json()["error"]["retryable"] and second.get("/healthz").status_code in (200, 503)
            assert running.result().json()["stdout"] == "finished\n"
    assert server.end() == (0, "")


def test_a_drain_has_an_end() -> None:
    server = Served("--drain", "0.5", "--wall", "60")
    with server.client() as http:
        thread = threading.Thread(target=_ignore_the_end, args=(http,))
        thread.start()
        assert eventually(lambda: stats(http)["running"] == 1)
        below = descendants(server.process.pid)
        server.terminate()
        server.process.wait(30)
        thread.join()
    assert server.end()[0] == 0
    assert eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in below))


def test_a_server_without_standard_streams_serves_and_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "s"
    command = [sys.executable, "-m", "retool", "sandbox", "serve", "--profile", "py-bare", "--uds", str(path)]
    process = subprocess.Popen(command, cwd=ROOT, preexec_fn=lambda: os.closerange(0, 3))  # as careless daemons do
    try:

        def listens() -> bool:
            with socket.socket(socket.AF_UNIX) as client:
                return client.connect_ex(str(path)) == 0

        assert eventually(listens)
        transport = httpx.HTTPTransport(uds=str(path))
        with httpx.Client(base_url="http://sandbox", transport=transport, trust_env=False, timeout=60) as http:
            assert exec_(http, "print(1)").json()["stdout"] == "1\n"
            streams = {str(Path(f"/proc/{process.pid}/fd/{number}").readlink()) for number in range(3)}
            assert streams == {"/dev/null"}
    finally:
        process.terminate()
        assert process.wait(40) == 0
