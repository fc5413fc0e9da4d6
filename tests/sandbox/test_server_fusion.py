"""SandboxFusion's own client, unmodified, against a real server."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import httpx
import pytest
import sandbox_fusion as sf

from tests.sandbox.serving import Served, served


@pytest.fixture(scope="module")
def server() -> Iterator[Served]:
    with served(profile="py-math") as it:
        sf.set_endpoint(it.url)
        yield it


def run(server: Served, code: str, language: str = "python", **fields: object) -> sf.RunCodeResponse:
    return sf.run_code(sf.RunCodeRequest(code=code, language=language, **fields), max_attempts=1, client_timeout=60)


def test_success_failure_and_timeout_as_there(server: Served) -> None:
    fine = run(server, "import numpy\nprint(numpy.arange(3).sum())")
    assert fine.status == sf.RunStatus.Success and fine.message == "" and fine.compile_result is None
    assert fine.run_result is not None and fine.run_result.status == sf.CommandRunStatus.Finished
    assert (fine.run_result.return_code, fine.run_result.stdout, fine.run_result.stderr) == (0, "3\n", "")
    assert fine.run_result.execution_time is not None and fine.run_result.execution_time < 10
    failed = run(server, "import sys\nprint('out')\nsys.stderr.write('mine\\n')\n1/0")
    assert failed.status == sf.RunStatus.Failed and failed.run_result is not None
    assert failed.run_result.return_code == 1 and failed.run_result.stdout == "out\n"
    assert (failed.run_result.stderr or "").startswith("mine\nTraceback (most recent call last)")
    assert (failed.run_result.stderr or "").endswith("ZeroDivisionError: division by zero\n")
    slow = run(server, "print('early', flush=True)\nwhile True: pass", run_timeout=0.5)
    assert slow.status == sf.RunStatus.Failed and slow.run_result is not None
    assert slow.run_result.status == sf.CommandRunStatus.TimeLimitExceeded
    assert slow.run_result.stdout == "early\n" and slow.run_result.return_code is None
    mapping = sf.SummaryMapping(Success="S", Failed="F", RunTimeout="T")
    assert [sf.summary_run_code_result(each, mapping) for each in (fine, failed, slow)] == ["S", "F", "T"]


def test_a_script_is_no_repl(server: Served) -> None:
    assert run(server, "1 + 1").run_result.stdout == ""  # type: ignore[union-attr]
    assert "SyntaxError" in (run(server, "x = (").run_result.stderr or "")  # type: ignore[union-attr]
    assert run(server, "x = \\").status == sf.RunStatus.Failed
    assert run(server, "import sys; sys.exit(7)").run_result.return_code == 7  # type: ignore[union-attr]
    assert run(server, "import os; os.abort()").run_result.return_code == -6  # type: ignore[union-attr]


def test_stdin_and_files(server: Served) -> None:
    answer = run(
        server,
        "import pathlib, sys\npathlib.Path('out').write_bytes(pathlib.Path('d/in').read_bytes()[::-1])\n"
        "print(sys.stdin.read())",
        stdin="héllo",
        files={"d/in": base64.b64encode(b"\x00abc").decode(), "nothing": None},
        fetch_files=["out", "missing"],
    )
    assert answer.run_result is not None and answer.run_result.stdout == "héllo\n"
    assert {name: base64.b64decode(data) for name, data in answer.files.items()} == {"out": b"cba\x00"}


def test_a_memory_limit_is_the_programs_failure(server: Served) -> None:
    request = {"code": "x = bytearray(300 * 2**20)", "language": "python", "memory_limit_MB": 100}
    answer = httpx.post(f"{server.url}/run_code", json=request, trust_env=False).json()
    assert answer["status"] == "Failed" and answer["run_result"]["status"] == "Finished"
    assert answer["run_result"]["return_code"] != 0 and answer["outcome"] == "memory_limit"
    assert "MemoryError" in answer["run_result"]["stderr"] and answer["isolation"] and answer["request_id"]


def test_other_languages(server: Served) -> None:
    shell = run(server, "read x; echo got $x >&2; echo $((6*7)); exit 3", "bash", stdin="in\n")
    assert shell.run_result is not None
    assert (shell.run_result.return_code, shell.run_result.stdout, shell.run_result.stderr) == (3, "42\n", "got in\n")
    good = run(server, "def test_one():\n    assert 1 + 1 == 2\n", "pytest")
    assert good.status == sf.RunStatus.Success and "1 passed" in (good.run_result.stdout or "")  # type: ignore[union-attr]
    bad = run(server, "def test_two():\n    assert 1 + 1 == 3\n", "pytest")
    assert bad.status == sf.RunStatus.Failed and "assert (1 + 1) == 3" in (bad.run_result.stdout or "")  # type: ignore[union-attr]
    with pytest.raises(Exception, match=r"422.*'cpp' is not supported"):
        run(server, "int main() {}", "cpp")


async def test_the_asynchronous_client(server: Served) -> None:
    request = sf.RunCodeRequest(code="print('async')", language="python")
    answer = await sf.run_code_async(request, endpoint=server.url, max_attempts=1, client_timeout=60)
    assert answer.run_result is not None and answer.run_result.stdout == "async\n"
    cells = sf.RunJupyterRequest(cells=["a = 123", "a"])
    notebook = await sf.run_jupyter_async(cells, endpoint=server.url, max_attempts=1, client_timeout=60)
    assert notebook.status == sf.RunStatus.Success


def test_cells_share_an_interpreter(server: Served) -> None:
    cells = [
        "a = 123",
        "a",
        "print(a)",
        'import sys; _ = sys.stderr.write("stderr message")',
        'raise RuntimeError("error message")',
        "open('made', 'w').write('by a cell'); a + 1",
    ]
    data = base64.b64encode(b"7").decode()
    request = sf.RunJupyterRequest(cells=[*cells, "int(open('n').read())"], files={"n": data}, fetch_files=["made"])
    answer = sf.run_jupyter(request, max_attempts=1, client_timeout=60)
    assert answer.status == sf.RunStatus.Success and answer.driver is not None and len(answer.cells) == 7
    assert answer.cells[1].display == [{"text/plain": "123"}] and answer.cells[1].stdout == ""
    assert answer.cells[2].stdout == "123\n" and answer.cells[3].stderr == "stderr message"
    (error,) = answer.cells[4].error
    assert (error["ename"], error["evalue"]) == ("RuntimeError", "error message") and error["traceback"]
    assert answer.cells[5].display == [{"text/plain": "124"}], "an error ends its own cell only"
    assert answer.cells[6].display == [{"text/plain": "7"}]
    assert base64.b64decode(answer.files["made"]) == b"by a cell"


def test_cells_out_of_time(server: Served) -> None:
    slow = sf.RunJupyterRequest(cells=["print('done')", "while True: pass", "print('never')"], total_timeout=1)
    answer = sf.run_jupyter(slow, max_attempts=1, client_timeout=60)
    assert answer.status == sf.RunStatus.Failed and answer.driver is not None
    assert answer.driver.status == sf.CommandRunStatus.TimeLimitExceeded
    assert [cell.stdout for cell in answer.cells] == ["done\n", ""]
    each = sf.RunJupyterRequest(cells=["while True: pass"], cell_timeout=0.3)
    assert sf.run_jupyter(each, max_attempts=1, client_timeout=60).status == sf.RunStatus.Failed


def test_sessions_of_cells_are_closed(server: Served) -> None:
    with server.client() as http:
        assert http.get("/v1/ping").json() == "pong"
        assert "retool_sandbox_sessions 0.0" in http.get("/metrics").text
