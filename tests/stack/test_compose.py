"""The whole stack: the CPU profile trains in containers, on two sandboxes, one of which is killed; a page is served."""

from __future__ import annotations

import json
import os
import resource
import secrets
import shutil
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml

from tests.stack.engine import ROOT, TRAINER, build_trainer, docker

STEPS = 30
_SPREAD = """
import asyncio, json
from sandbox.names import addresses
from sandbox.remote import RemoteSandbox
async def main():
    token = open("/run/secrets/sandbox_token").read().strip()
    async with RemoteSandbox(addresses(["dns+http://sandbox:8080"]), token=token, coalesce=False) as box:
        count = lambda told: {url: server["executions"] for url, server in told["servers"].items()}
        before = count(await box.stats())
        await asyncio.gather(*(box.exec(f"print({i})") for i in range(60)))
        after = count(await box.stats())
        print(json.dumps([after[url] - before[url] for url in after]))
asyncio.run(main())
"""


def compose_command() -> list[str]:
    """Compose v2 where the engine's client has it, else v1."""
    if shutil.which("docker") and subprocess.run(["docker", "compose", "version"], capture_output=True).returncode == 0:
        return ["docker", "compose"]
    if shutil.which("docker-compose") is None:
        pytest.skip("neither `docker compose` nor docker-compose is installed")
    return ["docker-compose"]


class Stack:
    """A project of its own in a folder of its own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        for name in ("docker-compose.yml", "recipes"):
            copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile
            copy(ROOT / name, folder / name)
        (folder / "docker").mkdir()
        (folder / "docker/sandbox_token").write_text(secrets.token_hex(32))
        self.folder, self.command = folder, compose_command()
        self.environment = {**os.environ, "COMPOSE_PROJECT_NAME": f"retool{secrets.token_hex(4)}", **environment}

    def __call__(self, *args: str, check: bool = True) -> str:
        done = subprocess.run(
            [*self.command, "--profile", "cpu", *args],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def ids(self, service: str) -> list[str]:
        return self("ps", "-q", service).split()


def waited(holds: Callable[[], bool], seconds: float = 240.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.5)


@pytest.mark.parametrize("profile", ["cpu", "gpu"])
def test_compose_reads_the_file(profile: str, tmp_path: Path) -> None:
    stack = Stack(tmp_path)
    shutil.copyfile(ROOT / ".env.example", tmp_path / ".env")
    told = subprocess.run(
        [*stack.command, "--profile", profile, "config"],
        cwd=tmp_path,
        env=stack.environment,
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    services = yaml.safe_load(told.stdout)["services"]
    trainer = services["trainer" if profile == "cpu" else "trainer-gpu"]
    assert "sandbox.kind=remote" in str(trainer["command"]) and {"sandbox", "viewer"} <= set(services)
    assert set(services["sandbox"]["networks"]) == {"sandbox"}
    assert (stack.folder / "docker/sandbox_token").read_text() not in told.stdout


@pytest.fixture(scope="module")
def stack(sandbox_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    build_trainer(tmp_path_factory.mktemp("trainer"))
    made = Stack(
        tmp_path_factory.mktemp("stack"),
        TRAINER_IMAGE=TRAINER,
        SANDBOX_IMAGE=sandbox_image,
        SANDBOX_CPUS="1",
        SANDBOX_MEMORY="2g",
        SANDBOX_FILES=str(min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
        RETOOL_COMMAND=f"train recipes/tiny.yaml steps={STEPS} out=runs/stack",
        VIEWER_PORT="0",
        VIEWER_EVERY="2",
    )
    try:
        yield made
    finally:
        made("down", "-v", "--remove-orphans", check=False)


@pytest.mark.stack
@pytest.mark.slow
class TestRunning:
    """In order: the run, then its page."""

    def test_trains_to_the_end_with_two_sandboxes_one_of_them_killed(self, stack: Stack, tmp_path: Path) -> None:
        stack("up", "-d", "--no-build", "--scale", "sandbox=2", "trainer")
        [trainer] = stack.ids("trainer")
        boxes = stack.ids("sandbox")
        assert len(boxes) == 2

        def steps() -> list[dict[str, float]]:
            docker("cp", f"{trainer}:/srv/retool/runs/stack/learner.jsonl", str(tmp_path / "ledger"), check=False)
            if not (tmp_path / "ledger").exists():
                return []
            rows = [json.loads(line) for line in (tmp_path / "ledger").read_text().splitlines()]
            return [row["metrics"] for row in rows if "metrics" in row]

        waited(lambda: len(steps()) >= 1)
        executed = json.loads(docker("exec", trainer, "python3", "-c", _SPREAD).stdout)
        assert len(executed) == 2 and min(executed) >= 10, executed  # the load is spread
        docker("kill", boxes[0])
        assert len(steps()) < STEPS
        code = docker("wait", trainer, timeout=300).stdout.strip()
        assert code == "0", docker("logs", trainer, check=False).stdout
        metrics = steps()
        assert len(metrics) == STEPS
        assert metrics[-1]["count/trajectories"] == 16 * STEPS  # none was lost with the sandbox
        assert not metrics[-1].get("count/status_aborted") and not metrics[-1].get("count/lost_members")
        docker("cp", f"{trainer}:/srv/retool/runs/stack/model/config.json", str(tmp_path))

    def test_the_page_is_served_and_the_run_is_not(self, stack: Stack) -> None:
        stack("up", "-d", "--no-build", "--no-deps", "viewer")
        [viewer] = stack.ids("viewer")
        address = docker("port", viewer, "8000/tcp").stdout.split()[0]
        assert address.startswith("127.0.0.1:")

        def read(path: str) -> bytes:
            try:
                with urllib.request.urlopen(f"http://{address}/{path}", timeout=5) as reply:
                    return bytes(reply.read())
            except OSError:
                return b""

        waited(lambda: b"objective grpo" in read("stack.html"), 90)
        assert b"stack.html" in read("") and read("recipe.yaml") == read("runs/stack/recipe.yaml") == b""
