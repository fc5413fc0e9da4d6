"""The whole stack: the CPU profile trains with sandboxes and vLLM in containers of their own, every one of which is
killed three times; a page is served; the embedded engine takes vLLM's place by two lines of `.env`."""

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
from typing import Any

import pytest
import yaml

from tests.stack.engine import ROOT, TRAINER, VLLM, build_trainer, build_vllm, docker

STEPS = 120
# The recipe's tiny model has heads of 16 numbers, which vLLM does not know on CPU.
TRAIN = f"train recipes/tiny.yaml deterministic=false model.tiny.hidden=64 steps={STEPS} out=runs/stack"
_SPREAD = """
import asyncio, json
from sandbox.names import addresses
from sandbox.remote import RemoteSandbox
async def main():
    token = open("/run/secrets/sandbox_token").read().strip()
    async with RemoteSandbox(addresses(["dns+http://sandbox:8080"]), token=token, coalesce=False) as box:
        count = lambda told: {url: server["executions"] for url, server in told["servers"].items()}
        before = count(await box.stats())
        await asyncio.gather(*(box.exec(f"print({i})") for i in range(90)))
        after = count(await box.stats())
        print(json.dumps([after[url] - before[url] for url in after]))
asyncio.run(main())
"""
_KILL = """
import os
for name in os.listdir("/proc"):
    if name.isdigit() and open(f"/proc/{name}/stat").read().rsplit(") ", 1)[1].split()[1] == "1":
        os.kill(int(name), 9)
"""
_LOG = """
import json
from retool.rollout.log import RolloutLog
with RolloutLog("runs/stack/rollouts", read_only=True) as log:
    groups = [log.read_group(g) for step in range(%d) for g in log.group_ids(step)]
members = [t for group in groups for t in group.trajectories]
print(json.dumps([len(groups), len(members), sum(t.status == "aborted" for t in members),
                  sum(not t.usable for t in members)]))
"""


def compose_command() -> list[str]:
    """What RETOOL_COMPOSE names, else Compose v2 where the engine's client has it, else v1."""
    if os.environ.get("RETOOL_COMPOSE"):
        return [os.environ["RETOOL_COMPOSE"]]
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

    def __call__(self, *args: str, check: bool = True, **environment: str) -> str:
        done = subprocess.run(
            [*self.command, "--profile", "cpu", *args],
            cwd=self.folder,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not check or done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    def train(self, command: str, *services: str, boxes: int = 3, **environment: str) -> str:
        """Start the trainer and what it needs; gives back its container."""
        scale = ("--scale", f"sandbox={boxes}")
        self("up", "-d", "--no-build", *scale, "trainer", *services, RETOOL_COMMAND=command, **environment)
        [trainer] = self.ids("trainer")
        return trainer

    def ids(self, service: str) -> list[str]:
        return self("ps", "-q", service).split()

    def steps(self, run: str = "stack") -> list[dict[str, Any]]:
        """Metrics of the finished steps."""
        [trainer, *_] = docker(
            "ps", "-aq", "--filter", f"name={self.environment['COMPOSE_PROJECT_NAME']}.trainer"
        ).stdout.split()
        target = self.folder / "ledger"
        target.unlink(missing_ok=True)
        docker("cp", f"{trainer}:/srv/retool/runs/{run}/learner.jsonl", str(target), check=False)
        lines = target.read_text().splitlines() if target.exists() else []
        rows = [json.loads(line) for line in lines if line.endswith("}")]
        return [row for row in rows if "metrics" in row]


def waited(holds: Callable[[], bool], seconds: float = 400.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.5)


def kill(container: str) -> None:
    """`kill -9` of the container's main process, from inside: unlike `docker kill`, the engine starts it again."""
    docker("exec", container, "python3", "-c", _KILL, check=False)


def restarts(container: str) -> int:
    return int(docker("inspect", "-f", "{{.RestartCount}}", container).stdout)


def finished(stack: Stack, trainer: str) -> None:
    code = docker("wait", trainer, timeout=600).stdout.strip()
    logs = docker("logs", trainer, check=False)
    assert code == "0", logs.stdout[-3000:] + logs.stderr[-3000:]


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
    vllm = services["vllm" if profile == "cpu" else "vllm-gpu"]
    command = str(trainer["command"])
    assert "sandbox.kind=remote" in command and "engine.urls=[http://vllm:8000]" in command
    assert {"sandbox", "viewer"} <= set(services)
    assert set(services["sandbox"]["networks"]) == {"sandbox"} and set(vllm["networks"]) == {"engine"}
    assert vllm["cap_drop"] == ["ALL"] and "ports" not in vllm and "secrets" not in vllm
    assert (stack.folder / "docker/sandbox_token").read_text() not in told.stdout


@pytest.fixture(scope="module")
def stack(sandbox_image: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    build_trainer(tmp_path_factory.mktemp("trainer"))
    build_vllm(tmp_path_factory.mktemp("vllm"))
    made = Stack(
        tmp_path_factory.mktemp("stack"),
        TRAINER_IMAGE=TRAINER,
        SANDBOX_IMAGE=sandbox_image,
        VLLM_CPU_IMAGE=VLLM,
        SANDBOX_CPUS="1",
        SANDBOX_MEMORY="2g",
        SANDBOX_FILES=str(min(65536, resource.getrlimit(resource.RLIMIT_NOFILE)[1])),
        VIEWER_PORT="0",
        VIEWER_EVERY="20",
    )
    try:
        yield made
    finally:
        made("down", "-v", "--remove-orphans", check=False)


@pytest.mark.stack
@pytest.mark.slow
class TestRunning:
    """In order: the run, then its page."""

    def test_every_container_is_killed_three_times_and_no_trajectory_is_lost(self, stack: Stack) -> None:
        trainer = stack.train(TRAIN, "viewer")
        boxes, [vllm], [viewer] = stack.ids("sandbox"), stack.ids("vllm"), stack.ids("viewer")
        assert len(boxes) == 3
        waited(lambda: len(stack.steps()) >= 1)
        executed = json.loads(docker("exec", trainer, "python3", "-c", _SPREAD).stdout)
        assert len(executed) == 3 and min(executed) >= 10, executed  # the load is spread
        for turn in range(3):
            for victim in (boxes[turn], vllm, viewer):
                before, had = len(stack.steps()), restarts(victim)
                assert before < STEPS - 3
                kill(victim)
                waited(lambda v=victim, h=had: restarts(v) > h)  # type: ignore[misc]
                waited(lambda b=before: len(stack.steps()) > b + 1)  # type: ignore[misc]
        rows = stack.steps()
        metrics = rows[-1]["metrics"]
        assert metrics["count/trajectories"] == 16 * len(rows)
        assert metrics.get("count/status_aborted", 0) == metrics.get("count/lost_members", 0) == 0
        for _ in range(3):
            before = len(stack.steps())
            assert before < STEPS - 2
            kill(trainer)
            assert docker("wait", trainer, timeout=60).stdout.strip() == "137"
            trainer = stack.train(f"{TRAIN} --resume")
            waited(lambda b=before: len(stack.steps()) > b)  # type: ignore[misc]
        finished(stack, trainer)
        rows = stack.steps()
        assert [row["step"] for row in rows] == list(range(STEPS))
        assert rows[-1]["metrics"].get("count/status_aborted", 0) == 0
        found = stack("run", "--rm", "-T", "--no-deps", "--entrypoint", "python3", "viewer", "-c", _LOG % STEPS)
        assert json.loads(found.splitlines()[-1]) == [4 * STEPS, 16 * STEPS, 0, 0]

    def test_the_page_is_served_and_the_run_is_not(self, stack: Stack) -> None:
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

    def test_another_model_is_served_without_anybodys_help(self, stack: Stack) -> None:
        wider = TRAIN.replace("hidden=64", "hidden=128").replace(f"steps={STEPS}", "steps=2").replace("stack", "wider")
        finished(stack, stack.train(wider, boxes=1))
        assert len(stack.steps("wider")) == 2

    def test_the_embedded_engine_needs_two_lines(self, stack: Stack) -> None:
        command = "train recipes/tiny.yaml steps=2 out=runs/embedded"
        finished(stack, stack.train(command, boxes=1, RETOOL_ENGINE="", VLLM_SCALE="0"))
        assert len(stack.steps("embedded")) == 2 and not stack.ids("vllm")
