"""`DockerSandbox`: started, used, killed, crashed over, swept; and what it says without an engine or an image."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from retool.config import SandboxConfig
from retool.recipe import load_recipe
from retool.train import train
from retool.workshop import make_sandbox
from sandbox.docker_box import DockerSandbox
from sandbox.docker_engine import LABEL, dead, hardening, myself
from sandbox.types import ConfinementUnavailable, Limits, Sandbox, SandboxUnavailable, Status
from tests.stack.engine import ROOT, docker

stack = [pytest.mark.stack, pytest.mark.slow]
MEMORY = 2048


def box(image: str, **more: Any) -> DockerSandbox:
    return DockerSandbox(image, memory_mb=MEMORY, workers=2, **more)


def ours() -> list[str]:
    """Containers that a `DockerSandbox` started, in any state."""
    return docker("ps", "-aq", "--no-trunc", "--filter", f"label={LABEL}").stdout.split()


async def until(holds: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        await asyncio.sleep(0.1)


# --- without an engine ---------------------------------------------------------------------------------------------


def test_flags_are_those_of_the_compose_file() -> None:
    service = yaml.safe_load((ROOT / "docker/sandbox.compose.yml").read_text())["services"]["sandbox"]
    said = hardening(6144, 4)
    mount, options = next(iter(said["tmpfs"].items()))
    assert service["tmpfs"] == [f"{mount}:{options}"]
    assert (said["mem_limit"], said["memswap_limit"], said["nano_cpus"]) == ("6144m", "6144m", 4 * 10**9)
    assert (service["mem_limit"], service["memswap_limit"], service["cpus"]) == ("6g", "6g", 4)
    for key in ("init", "read_only", "cap_drop", "cap_add", "security_opt", "pids_limit"):
        assert said[key] == service[key], key
    assert said["ipc_mode"] == service["ipc"]


def test_the_stack_hardens_its_sandbox_just_so() -> None:
    alone = yaml.safe_load((ROOT / "docker/sandbox.compose.yml").read_text())["services"]["sandbox"]
    stacked = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    service = stacked["services"]["sandbox"]
    for key in ("init", "read_only", "cap_drop", "cap_add", "security_opt", "ipc", "tmpfs", "pids_limit", "networks"):
        assert service[key] == alone[key], key
    assert stacked["networks"] == {"sandbox": {"internal": True}, "engine": {"internal": True}}
    assert not {"privileged", "volumes", "environment", "ports", "network_mode", "pid"} & set(service)


def test_who_is_dead() -> None:
    me = myself()
    assert not dead(json.dumps(me))
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert dead(json.dumps({**me, "pid": gone.pid, "start": "1"}))
    assert dead(json.dumps({**me, "start": "1"}))  # this number, but another process
    assert dead(json.dumps({**me, "boot": "another"}))
    assert not dead(json.dumps({**me, "host": "elsewhere", "pid": gone.pid}))
    assert not any(dead(text) for text in ("", "{}", "[]", '{"host": 1}'))


async def test_no_engine_is_said_with_the_fix(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("docker.errors")
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/nobody.sock")
    with pytest.raises(ConfinementUnavailable, match=r"no Docker engine answers.*systemctl start docker"):
        await DockerSandbox().__aenter__()
    monkeypatch.setenv("DOCKER_HOST", "tcp://10.0.0.9:2375")
    with pytest.raises(ConfinementUnavailable, match=r"this machine.*sandbox.kind=remote"):
        await DockerSandbox().__aenter__()


def test_no_engine_is_one_line_of_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("docker.errors")
    command = [sys.executable, "-m", "retool", "train", "recipes/tiny.yaml", "sandbox.kind=docker", f"out={tmp_path}/r"]
    environment = {**os.environ, "DOCKER_HOST": f"unix://{tmp_path}/nobody.sock"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "no Docker engine answers" in done.stderr and "Traceback" not in done.stderr


async def test_not_open() -> None:
    unopened = DockerSandbox()
    assert isinstance(unopened, Sandbox)
    with pytest.raises(SandboxUnavailable, match="not open"):
        await unopened.exec("1")
    await unopened.close()


@pytest.mark.parametrize(
    ("bad", "says"), [({"memory_mb": 8}, "256"), ({"cpus": 0}, "cpus"), ({"transport": "x"}, "socket")]
)
def test_bad_arguments(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        DockerSandbox(**bad)


@pytest.mark.parametrize(
    ("bad", "says"),
    [
        ({"kind": "local", "image": "x"}, "need sandbox.kind docker"),
        ({"kind": "remote", "urls": ("http://h:1",), "runtime": "runsc"}, "need sandbox.kind docker"),
        ({"kind": "docker", "urls": ("http://h:1",)}, "need sandbox.kind remote"),
        ({"kind": "docker", "allow_unconfined": True}, "confines or does not start"),
    ],
)
def test_recipes_that_contradict_themselves(bad: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        SandboxConfig(**bad)


def test_a_recipe_makes_one() -> None:
    made = make_sandbox(SandboxConfig(kind="docker", image="mine", container_memory_mb=512, workers=3, runtime="runsc"))
    assert isinstance(made, DockerSandbox)
    assert (made.image, made.memory_mb, made.runtime, made.tier) == ("mine", 512, "runsc", None)


# --- with an engine ------------------------------------------------------------------------------------------------


class TestRunning:
    """Everything that needs an engine."""

    pytestmark = stack

    async def test_runs_code_confined_and_leaves_nothing(self, sandbox_image: str) -> None:
        async with box(sandbox_image, limits=Limits(wall_s=5)) as running:
            [mine] = [c for c in ours() if c == running.container_id]
            result = await running.exec("import os, socket; print(os.getuid()); socket.socket()")
            assert int(result.stdout) >= 30_000 and result.status is Status.ERROR and result.isolation == "uid"
            said = json.loads(docker("inspect", mine).stdout)[0]
            host = said["HostConfig"]
            assert host["ReadonlyRootfs"] and host["CapDrop"] == ["ALL"] and host["NetworkMode"] == "none"
            assert host["Memory"] == host["MemorySwap"] == MEMORY << 20 and host["PidsLimit"] == 1024
            assert not host["Privileged"] and host["AutoRemove"] and host["Init"]
            assert running._token not in json.dumps(said)
            folder = running._container._folder  # type: ignore[union-attr]
            assert folder.stat().st_mode & 0o077 == 0
        await until(lambda: mine not in ours())
        assert not folder.exists()

    async def test_is_a_sandbox_with_sessions_files_and_forks(self, sandbox_image: str) -> None:
        async with box(sandbox_image) as running:
            assert isinstance(running, Sandbox)
            got = await running.exec("open('b','w').write(open('a').read()*2)", files={"a": b"xy"}, fetch=("b",))
            assert got.files == {"b": b"xyxy"}
            async with running.session() as session:
                await session.exec("x = 41")
                [copy] = await session.fork(1)
                assert (await copy.exec("x += 1; print(x)")).stdout == "42\n"
                assert (await (await running.attach(session.id)).exec("print(x)")).stdout == "41\n"
                snapshot = await session.snapshot()
            [again] = await running.restore(snapshot)
            assert (await again.exec("print(x)")).stdout == "41\n"
            await running.drop_snapshot(snapshot)
            assert (await running.capabilities())["tier"] == "uid"
            assert (await running.stats())["executions"] >= 1
            many = await asyncio.gather(*(running.exec(f"print({i})") for i in range(40)))
            assert [r.stdout for r in many] == [f"{i}\n" for i in range(40)]

    async def test_its_token_is_needed(self, sandbox_image: str) -> None:
        from sandbox.remote import RemoteSandbox
        from sandbox.types import SandboxError

        async with box(sandbox_image) as running:
            with pytest.raises(SandboxError, match="token"):
                await RemoteSandbox(running._container.url).__aenter__()  # type: ignore[union-attr]

    async def test_a_killed_container_is_replaced_and_no_call_is_lost(self, sandbox_image: str) -> None:
        async with box(sandbox_image) as running:
            before = running.container_id
            calls = [asyncio.create_task(running.exec(f"import time; time.sleep(1); print({i})")) for i in range(4)]
            await asyncio.sleep(0.3)
            await asyncio.to_thread(docker, "kill", before)
            assert [(await call).stdout for call in calls] == [f"{i}\n" for i in range(4)]
            assert running.container_id != before and (await running.stats())["container_restarts"] == 1
            assert len([c for c in ours() if c in (before, running.container_id)]) == 1

    async def test_a_killed_owner_leaves_a_container_that_the_next_one_removes(self, sandbox_image: str) -> None:
        program = (
            "import asyncio, sys\nfrom sandbox.docker_box import DockerSandbox\nasync def main():\n"
            f"  async with DockerSandbox({sandbox_image!r}, memory_mb={MEMORY}, workers=1) as box:\n"
            "    print(box.container_id, flush=True); await asyncio.sleep(600)\nasyncio.run(main())\n"
        )
        command = [sys.executable, "-c", program]
        owner = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        assert owner.stdout is not None
        with owner:
            left = owner.stdout.readline().strip()
            assert left in ours()
            async with box(sandbox_image) as other:  # the owner lives: its container stays
                assert {left, other.container_id} <= set(ours())
            owner.send_signal(signal.SIGKILL)
            owner.wait()
        assert left in ours()
        async with box(sandbox_image) as other:
            assert left not in ours() and other.container_id in ours()

    async def test_an_error_inside_the_block_ends_the_container(self, sandbox_image: str) -> None:
        with pytest.raises(ZeroDivisionError):
            async with box(sandbox_image) as running:
                mine = running.container_id
                raise ZeroDivisionError
        await until(lambda: mine not in ours())

    async def test_an_image_that_is_not_there(self, sandbox_image: str) -> None:
        with pytest.raises(ConfinementUnavailable, match=r"no image 'retool-no-such'.*docker build"):
            await DockerSandbox("retool-no-such").__aenter__()

    async def test_a_runtime_that_is_not_there(self, sandbox_image: str) -> None:
        with pytest.raises(ConfinementUnavailable, match="no runtime 'retool-no-such'"):
            await box(sandbox_image, runtime="retool-no-such").__aenter__()

    async def test_a_server_that_cannot_prove_its_tier_is_quoted(self, sandbox_image: str) -> None:
        before = set(ours())
        with pytest.raises(ConfinementUnavailable, match=r"ended before it was ready: .*\bns\b"):
            await box(sandbox_image, tier="ns").__aenter__()
        await until(lambda: set(ours()) <= before)

    async def test_over_a_port_of_this_machine(self, sandbox_image: str) -> None:
        if "bridge" not in docker("network", "ls", "--format", "{{.Name}}").stdout.split():
            pytest.skip("this engine has no bridge network")
        async with box(sandbox_image, transport="port") as running:
            assert running._container.url.startswith("http://127.0.0.1:")  # type: ignore[union-attr]
            assert (await running.exec("print(6*7)")).stdout == "42\n"

    async def test_a_recipe_trains_with_it(self, sandbox_image: str, tmp_path: Path) -> None:
        keys = ["sandbox.kind=docker", f"sandbox.image={sandbox_image}", f"sandbox.container_memory_mb={MEMORY}"]
        recipe = load_recipe(ROOT / "recipes/tiny.yaml", [*keys, "steps=1", f"out={tmp_path / 'run'}"])
        result = await train(recipe)
        assert len(result.metrics) == 1 and result.folder.model.is_dir()
