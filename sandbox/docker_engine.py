"""Docker for `DockerSandbox`: the engine, one hardened container, and what was left behind by owners that died."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import platform
import secrets
import shutil
import socket
import sys
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import Any

from sandbox.types import ConfinementUnavailable, SandboxUnavailable

LABEL = "retool.sandbox.owner"
"""Who started a container: JSON of host, boot, process id and that process's start."""
INSIDE = "/run/retool"
TOKEN = "/run/secrets/sandbox_token"
PORT = 8080
_LINES = 40
_GOODBYE_S = 5.0
_LONGEST_SOCKET = 100  # a Unix socket's path has 108 bytes


def hardening(memory_mb: int, cpus: float) -> dict[str, Any]:
    """Keyword arguments of the SDK that say what docker/sandbox.compose.yml says."""
    return {
        "init": True,
        "read_only": True,
        "cap_drop": ["ALL"],
        "cap_add": ["SETUID", "SETGID", "KILL"],
        "security_opt": ["no-new-privileges:true"],
        "ipc_mode": "private",
        "tmpfs": {"/tmp": "size=2g,nr_inodes=200k,mode=1777"},
        "pids_limit": 1024,
        "mem_limit": f"{memory_mb}m",
        "memswap_limit": f"{memory_mb}m",
        "nano_cpus": int(cpus * 1e9),
    }


def default_transport(runtime: str | None) -> str:
    """`socket` where containers share this kernel's Unix sockets; gVisor and virtual machines (macOS) do not."""
    return "socket" if sys.platform == "linux" and runtime is None else "port"


class Engine:
    """The engine of the environment (`DOCKER_HOST`, or the local one). Raises `ConfinementUnavailable`."""

    def __init__(self) -> None:
        try:
            # By name: beside a checkout's folder of that name, type checkers would take the folder.
            docker, errors, types, requests = map(
                importlib.import_module, ("docker", "docker.errors", "docker.types", "requests.exceptions")
            )
        except ImportError:
            raise ConfinementUnavailable(
                "DockerSandbox needs the Docker SDK: pip install 'retool-rl[docker]'"
            ) from None
        self.errors, self.types = errors, types
        self.failures = (errors.DockerException, requests.RequestException, OSError)
        where = os.environ.get("DOCKER_HOST", "the default socket")
        if where.startswith(("tcp://", "ssh://", "http")):
            raise ConfinementUnavailable(
                f"DockerSandbox needs the engine of this machine, but DOCKER_HOST is {where}; on another machine run "
                "`retool sandbox serve` (docker/sandbox.compose.yml) and use sandbox.kind=remote with its URL"
            )
        try:
            _knock(where)
            self.client = docker.from_env(timeout=60)
            self.cores = int(self.client.info().get("NCPU") or os.cpu_count() or 1)
        except self.failures as error:
            raise ConfinementUnavailable(
                f"no Docker engine answers at {where} ({_brief(error)}); start it (systemctl start docker), let this "
                "user use it (usermod -aG docker USER, then log in again), or use sandbox.kind=local, which needs none"
            ) from None

    def close(self) -> None:
        """Hang up."""
        self.client.close()

    def sweep(self) -> int:
        """Remove the containers of owners on this machine that are dead; how many those were. Never raises."""
        removed = 0
        try:
            found = self.client.containers.list(all=True, filters={"label": LABEL})
        except self.failures:
            return 0
        for container in found:
            if dead(container.labels.get(LABEL, "")):
                with contextlib.suppress(*self.failures):
                    container.remove(force=True)
                    removed += 1
        return removed


def _knock(where: str) -> None:
    """Raises `OSError` when nobody listens: the SDK finds that out too, but leaves its socket open then."""
    with socket.socket(socket.AF_UNIX) as probe:
        probe.settimeout(10)
        probe.connect(where.removeprefix("unix://") if where.startswith("unix://") else "/var/run/docker.sock")


class Container:
    """One container of an `Engine`, which may be started again after it ended. `ended` is set while none runs."""

    def __init__(self, engine: Engine, image: str, token: str, transport: str) -> None:
        self.engine, self.image, self.transport = engine, image, transport
        self.id = ""
        self.ended = threading.Event()
        self._lock = threading.Lock()  # a start that was given up must not outlive `remove`
        self._removed = False
        self._lines: deque[str] = deque(maxlen=_LINES)
        self._running: Any = None
        self._reader: threading.Thread | None = None
        self._folder = _private_folder()
        self._token_file = self._folder / "token"
        self._token_file.write_text(token + "\n", encoding="utf-8")
        self._token_file.chmod(0o444)  # the container's root reads it without any capability; the folder is ours alone
        self._shared = self._folder / "s"
        self._shared.mkdir()
        self._shared.chmod(0o777)
        self._port = _free_port() if transport == "port" else 0

    @property
    def url(self) -> str:
        """Where its server is reached."""
        return f"http://127.0.0.1:{self._port}" if self._port else f"unix:{self._shared}/box"

    def said(self) -> str:
        """The last of its output, for an error message."""
        return " | ".join(self._lines)[-2000:] or "nothing"

    def start(self, *, command: list[str], runtime: str | None, memory_mb: int, cpus: float | None) -> None:
        """Create and start it. Raises `ConfinementUnavailable` for what can be mended, else `SandboxUnavailable`."""
        with self._lock:
            if not self._removed:
                self._start(command, runtime, memory_mb, cpus)

    def _start(self, command: list[str], runtime: str | None, memory_mb: int, cpus: float | None) -> None:
        engine = self.engine
        self._drop()
        self._lines.clear()
        self.ended = threading.Event()
        mount = engine.types.Mount
        mounts = [mount(TOKEN, str(self._token_file), type="bind", read_only=True)]
        if self._port:
            server = ["--host", "0.0.0.0", "--port", str(PORT)]
            place: dict[str, Any] = {"ports": {f"{PORT}/tcp": ("127.0.0.1", self._port)}}
        else:
            server = ["--uds", f"{INSIDE}/box", "--uds-mode", "666"]
            place = {"network_mode": "none"}
            mounts.append(mount(INSIDE, str(self._shared), type="bind"))
        try:
            self._running = engine.client.containers.create(
                self.image,
                ["serve", *server, "--token-file", TOKEN, *command],
                name=f"retool-sandbox-{secrets.token_hex(4)}",
                labels={LABEL: json.dumps(myself())},
                mounts=mounts,
                ulimits=[engine.types.Ulimit(name="core", soft=0, hard=0)],
                healthcheck={"test": ["NONE"]},
                auto_remove=True,
                runtime=runtime,
                **place,
                **hardening(memory_mb, min(cpus or engine.cores, engine.cores)),
            )
            output = self._running.attach(stdout=True, stderr=True, stream=True, logs=True)
            self.id = str(self._running.id)
            self._reader = threading.Thread(target=self._read, args=(output, self.ended), daemon=True)
            self._reader.start()
            self._running.start()
        except engine.failures as error:
            self._drop()
            self.ended.set()
            raise self._failure(error, runtime) from None

    def _failure(self, error: Exception, runtime: str | None) -> Exception:
        said = _brief(error)
        if isinstance(error, self.engine.errors.ImageNotFound):
            return ConfinementUnavailable(
                f"the Docker engine has no image {self.image!r}; build it from the repository's root: "
                f"docker build -f docker/sandbox.Dockerfile -t {self.image} ."
            )
        if runtime is not None and "runtime" in said:
            return ConfinementUnavailable(
                f"the Docker engine has no runtime {runtime!r} ({said}); install it and name it in "
                "/etc/docker/daemon.json, or leave sandbox.runtime out"
            )
        if isinstance(error, self.engine.errors.APIError) and error.is_client_error():
            return ConfinementUnavailable(f"the Docker engine refuses the sandbox's container: {said}")
        return SandboxUnavailable(f"the Docker engine does not start the sandbox's container: {said}")

    def _read(self, output: Any, ended: threading.Event) -> None:
        """In a thread: keep what the container says; the end of its output is its end."""
        with contextlib.suppress(Exception):
            for chunk in output:
                self._lines.extend(line for line in chunk.decode(errors="replace").splitlines() if line.strip())
        ended.set()
        with contextlib.suppress(Exception):
            output.close()
        with contextlib.suppress(Exception):  # that marks the socket as closed; the response holds it open
            output._response.close()

    def _drop(self) -> None:
        if self._running is not None:
            with contextlib.suppress(*self.engine.failures):
                self._running.remove(force=True)
            self._running = None
        if self._reader is not None:
            self._reader.join(_GOODBYE_S)
            self._reader = None

    def remove(self) -> None:
        """End and remove it, and its folder. May be called twice."""
        with self._lock:
            self._removed = True
            self._drop()
            shutil.rmtree(self._folder, ignore_errors=True)


def myself() -> dict[str, Any]:
    """The owner that this process is."""
    return {"host": platform.node(), "boot": _boot(), "pid": os.getpid(), "start": _start_of(os.getpid())}


def dead(owner: str) -> bool:
    """Whether the owner written on a label lived on this machine and is gone. False when nobody can tell."""
    try:
        told = json.loads(owner)
        host, boot, pid, start = str(told["host"]), str(told["boot"]), int(told["pid"]), str(told["start"])
    except (ValueError, KeyError, TypeError):
        return False
    if host != platform.node():
        return False
    if boot != _boot():
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    now = _start_of(pid)
    return bool(start and now and start != now)


def _boot() -> str:
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _start_of(pid: int) -> str:
    """When a process started, in ticks since boot; process ids are used again, this pair is not."""
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19]
    return ""


def _private_folder() -> Path:
    """A folder that only this user enters, with a name short enough for a socket in it."""
    made = Path(tempfile.mkdtemp(prefix="retool-docker-"))
    if len(str(made)) + 8 > _LONGEST_SOCKET:
        made.rmdir()
        made = Path(tempfile.mkdtemp(prefix="retool-docker-", dir="/tmp"))
    return made


def _free_port() -> int:
    """A port that was free a moment ago; kept over restarts, so that clients find the server again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _brief(error: Exception) -> str:
    return " ".join(str(getattr(error, "explanation", None) or error).split())[:400]
