"""The container for real: built, started with the flags of the compose file, used, attacked, killed, restarted."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.stack.engine import ROOT, NoEngine, build, container, docker, engine, hardening

pytestmark = [pytest.mark.stack, pytest.mark.slow]

_REQUEST = """
import json, sys, urllib.error, urllib.request
told = json.loads(sys.stdin.read())
request = urllib.request.Request("http://127.0.0.1:8080" + told["path"], headers=told["headers"])
if told["body"] is not None:
    request.data = json.dumps(told["body"]).encode()
    request.add_header("content-type", "application/json")
try:
    with urllib.request.urlopen(request, timeout=90) as reply:
        print(json.dumps([reply.status, reply.read().decode()]))
except urllib.error.HTTPError as error:
    print(json.dumps([error.code, error.read().decode()]))
except OSError as error:
    print(json.dumps([0, str(error)]))
"""
_PROCESSES = """
import json, os
rows = []
for name in os.listdir("/proc"):
    if name.isdigit():
        try:
            fields = open(f"/proc/{name}/stat").read().rsplit(") ", 1)[1].split()
            rows.append((int(name), os.stat(f"/proc/{name}").st_uid, fields[0], open(f"/proc/{name}/cmdline").read()))
        except OSError:
            pass
print(json.dumps(rows))
"""


class Service:
    """The container and its token."""

    def __init__(self, name: str, token: str) -> None:
        self.name, self.token = name, token

    def request(self, path: str, body: Any = None, *, token: bool = True) -> tuple[int, str]:
        """(HTTP status, text); status 0 when nobody answers."""
        headers = {"authorization": f"Bearer {self.token}"} if token else {}
        told = json.dumps({"path": path, "body": body, "headers": headers})
        status, text = self.python(_REQUEST, told)
        return int(status), str(text)

    def python(self, code: str, stdin: str = "") -> Any:
        """What a program inside the container prints, as JSON."""
        return json.loads(docker("exec", "-i", self.name, "python3", "-c", code, input=stdin).stdout)

    def execute(self, code: str) -> dict[str, Any]:
        status, text = self.request("/v1/exec", {"code": code})
        assert status == 200, text
        return dict(json.loads(text))

    def wait(self) -> None:
        """Until it is ready."""
        end = time.monotonic() + 90
        while self.request("/healthz", token=False)[0] != 200:
            logs = docker("logs", self.name, check=False)
            assert time.monotonic() < end, logs.stdout + logs.stderr
            time.sleep(0.5)

    def supervisor(self) -> int:
        """Process id, inside, of the supervisor."""
        return next(int(row[0]) for row in self.python(_PROCESSES) if "boot.py\0supervisor" in row[3])


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("stack")
    try:
        with engine():
            build(folder)
            with container(folder) as (name, token):
                made = Service(name, token)
                made.wait()
                yield made
    except NoEngine as reason:
        pytest.skip(str(reason))


def test_flags_are_the_hard_ones() -> None:
    flags = hardening()
    assert {"--read-only", "--init", "--cap-drop=ALL", "--security-opt=no-new-privileges:true"} <= set(flags)
    assert {flag for flag in flags if "cap-add" in flag} == {"--cap-add=SETUID", "--cap-add=SETGID", "--cap-add=KILL"}
    compose = yaml.safe_load((ROOT / "docker/sandbox.compose.yml").read_text())
    service = compose["services"]["sandbox"]
    assert compose["networks"] == {"sandbox": {"internal": True}} and service["networks"] == ["sandbox"]
    assert not {"privileged", "volumes", "environment", "ports", "network_mode", "pid"} & set(service)


def test_runs_as_tier_uid_with_the_packages(service: Service) -> None:
    capabilities = json.loads(service.request("/v1/capabilities")[1])
    assert capabilities["tier"] == "uid"
    result = service.execute("import os, sympy, numpy; print(os.getuid(), sympy.factor(6), numpy.arange(3).sum())")
    uid, *rest = result["stdout"].split()
    assert result["status"] == "ok" and int(uid) >= 30_000 and rest == ["6", "3"]
    assert service.execute("import scipy.stats, pandas; print(pandas.DataFrame({'a': [1]}).a.sum())")["stdout"] == "1\n"


def test_needs_the_token_and_tells_nobody_else(service: Service) -> None:
    assert service.request("/v1/exec", {"code": "1"}, token=False)[0] == 401
    assert service.request("/healthz", token=False)[0] == 200
    result = service.execute("import os; print(sorted(os.environ)); print(open('/run/secrets/sandbox_token').read())")
    assert result["status"] == "error" and "PermissionError" in json.dumps(result)
    assert service.token not in json.dumps(result) and "TOKEN" not in result["stdout"]


def test_the_battery_is_green_inside(service: Service) -> None:
    done = docker("exec", service.name, "retool", "sandbox", "attack", "--tier", "uid", "--json", check=False)
    found = json.loads(done.stdout)
    bad = [row for row in found["attacks"] if row["verdict"] == "breach"]
    assert (done.returncode, found["tier"], bad) == (0, "uid", []), done.stderr
    assert found["counts"]["held"] > 80


def test_a_killed_supervisor_is_replaced(service: Service) -> None:
    assert service.execute("print(1)")["stdout"] == "1\n"
    before = service.supervisor()
    service.python(f"import os; os.kill({before}, 9); print(1)")
    end = time.monotonic() + 60
    while (found := service.request("/v1/exec", {"code": "print(2)"}))[0] != 200:
        assert found[0] in (502, 503), found  # ours, and typed
        assert json.loads(found[1])["error"]["retryable"] is True, found
        assert time.monotonic() < end
        time.sleep(0.2)
    assert json.loads(found[1])["stdout"] == "2\n"
    assert service.supervisor() != before
    rows = service.python(_PROCESSES)
    assert len([row for row in rows if "boot.py\0supervisor" in row[3]]) == 1


def test_restart_leaves_nothing(service: Service) -> None:
    leave = "import os, time\nopen('left', 'w').write('x')\nif os.fork() == 0:\n  os.setsid(); time.sleep(300)"
    assert service.execute(leave)["status"] == "ok"
    docker("restart", "-t", "20", service.name)
    service.wait()
    assert service.execute("print(3)")["stdout"] == "3\n"
    rows = service.python(_PROCESSES)
    assert not [row for row in rows if row[1] >= 30_000 and "sleep" in row[3]]
    folders = service.python("import json, os; print(json.dumps(os.listdir('/tmp')))")
    assert len([name for name in folders if name.startswith("retool-sandbox-")]) == 1, folders


@pytest.mark.skipif(shutil.which("docker-compose") is None, reason="docker-compose is not installed")
def test_the_compose_file_is_one(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "docker", tmp_path / "docker")
    done = subprocess.run(
        ["docker-compose", "-f", str(tmp_path / "docker/sandbox.compose.yml"), "config", "-q"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
