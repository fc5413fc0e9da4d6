"""Starts and stops a vLLM server that has what retool needs; also by hand, for `engine.urls`:

    python -m retool.engines.vllm_server --share FOLDER --host 0.0.0.0 --port 8000 [more vLLM arguments]
    python -m retool.engines.vllm_server MODEL --host 0.0.0.0 --port 8000 [--dtype bfloat16] [more vLLM arguments]

The first serves what a run with `engine.share=FOLDER` puts there, and begins anew when a run brings another model
(vllm_keeper.py); the second serves MODEL only.

Such a server lets whoever reaches it load weights: keep it on a private network. One that a run starts for itself
listens on a unix socket in a folder that only its user can open, and ends when the run does, even by `kill -9`.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from retool.errors import UserError

_log = logging.getLogger(__name__)
_TELL_EVERY_S = 30.0
_HERE = Path(__file__).parent
_INSTALL = "make one with `make vllm-env` (CPU) or give engine.python=/path/to/python of an environment with vLLM"


def find_python(given: str | None) -> str:
    """An interpreter that has vLLM. Raises `UserError` when there is none."""
    named = given or os.environ.get("RETOOL_VLLM_PYTHON")
    candidates = [named] if named else [".venv-vllm/bin/python", sys.executable]
    for python in candidates:
        path = shutil.which(python)
        if path is not None and has_vllm(path):
            return str(Path(path).absolute())
    raise UserError(f"engine.kind vllm: no vLLM in {' or '.join(candidates)}; {_INSTALL}")


def has_vllm(python: str) -> bool:
    """Whether vLLM is installed there; nothing heavy is imported."""
    code = "import importlib.util as u, sys; sys.exit(u.find_spec('vllm') is None)"
    return subprocess.run([python, "-c", code], capture_output=True, stdin=subprocess.DEVNULL).returncode == 0


def write_plugin(folder: Path) -> Path:
    """Put the files that run inside vLLM into `folder`, as the package `retool_vllm`; gives back `folder`."""
    package = folder / "retool_vllm"
    package.mkdir(parents=True, exist_ok=True)
    for name in ("vllm_plugin.py", "vllm_launch.py", "text.py", "weight_group.py", "weight_wire.py"):
        shutil.copyfile(_HERE / name, package / name.removeprefix("vllm_"))
    (package / "__init__.py").write_text('"""Runs inside vLLM; see retool.engines.vllm_plugin."""\n', encoding="utf-8")
    return folder


def arguments(
    model: str,
    *,
    where: Sequence[str],
    dtype: str = "float32",
    context: int | None = None,
    slots: int = 64,
    cpu: bool = False,
    more: Sequence[str] = (),
) -> list[str]:
    """vLLM's command line. `where`: `--uds PATH` or `--host`, `--port`."""
    made = ["--model", model, "--served-model-name", "policy", *where]
    made += ["--dtype", dtype, "--max-num-seqs", str(slots), "--generation-config", "vllm"]
    made += ["--logprobs-mode", "processed_logprobs", "--enable-prefix-caching"]
    made += ["--no-async-scheduling"]  # bans must see every sampled id before the next one is chosen
    made += ["--logits-processors", "retool_vllm.plugin:Bans"]
    made += ["--worker-extension-cls", "retool_vllm.plugin.WorkerExtension"]
    made += ["--weight-transfer-config", '{"backend": "retool"}']
    made += ["--max-model-len", str(context)] if context is not None else []
    made += ["--enforce-eager", "--block-size", "32"] if cpu else []
    return [*made, *more]


def environment(plugin: Path, *, cpu: bool) -> dict[str, str]:
    """Of the server's process: this one's, with RL endpoints on and telemetry off."""
    made = {**os.environ, "PYTHONPATH": str(plugin), "VLLM_SERVER_DEV_MODE": "1"}
    made.setdefault("VLLM_NO_USAGE_STATS", "1")
    made.setdefault("DO_NOT_TRACK", "1")
    made.setdefault("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "1")  # adapters, where --enable-lora makes room for them
    made.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # the second one wants another kind of logits processor
    if cpu:
        made.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
        made.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
        if shutil.which("g++") is None:
            made.setdefault("TORCH_COMPILE_DISABLE", "1")  # the sampler's few compiled functions want a compiler
    return made


def spawn(
    python: str, plugin: Path, command: Sequence[str], env: Mapping[str, str], output: IO[bytes] | None
) -> subprocess.Popen[bytes]:
    """A server that ends when this process does, however that goes. `output`: its log; None: where ours goes."""
    return subprocess.Popen(
        [python, str(plugin / "retool_vllm" / "launch.py"), *command],
        stdin=subprocess.PIPE,
        stdout=output,
        stderr=output and subprocess.STDOUT,
        env={**env, "RETOOL_LIFELINE": "1"},
        start_new_session=True,
    )


def end(process: subprocess.Popen[bytes]) -> None:
    """End what `spawn` started, with all its processes."""
    if process.poll() is None:
        _signal(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
    _signal(process.pid, signal.SIGKILL)  # whoever of its group is left
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


class LocalServer:
    """A server of this run's own. `url` is `unix:...`; `start` returns at once, `wait` until it answers."""

    def __init__(self, python: str, model: str, folder: Path, **options: Any) -> None:
        """`folder`: short and private (a unix socket's path may have 100 characters); options as in `arguments`."""
        self.folder = folder
        self.socket = folder / "s"
        self.url = f"unix:{self.socket}"
        self.log = folder / "vllm.log"
        self._python, self._model, self._options = python, model, options
        self._process: subprocess.Popen[bytes] | None = None

    @classmethod
    def new(cls, python: str, model: str, **options: Any) -> LocalServer:
        """In a fresh folder under the system's temporary one."""
        return cls(python, model, Path(tempfile.mkdtemp(prefix="retool-vllm-")), **options)

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self, model: str | None = None) -> None:
        """Start it (again), from `model` when the weights have moved on."""
        self.kill()
        self._model = model or self._model
        plugin = write_plugin(self.folder / "plugin")
        command = arguments(self._model, where=["--uds", str(self.socket)], **self._options)
        env = environment(plugin, cpu=bool(self._options.get("cpu")))
        with self.log.open("ab") as log:
            self._process = spawn(self._python, plugin, command, env, log)

    async def wait(self, seconds: float, ready: Any) -> None:
        """Until `await ready()` raises no more. Raises `UserError` with the log's end when it dies or is late."""
        begun = told = time.monotonic()
        end = begun + seconds
        while True:
            if self.socket.exists():
                try:
                    await ready()
                    return
                except Exception as error:
                    if not getattr(error, "retryable", False):
                        raise
            if not self.alive:
                raise UserError(f"the vLLM server ended before it answered; the end of its log:\n{self.tail()}")
            if time.monotonic() > end:
                raise UserError(f"the vLLM server did not answer within engine.start_s ({seconds:g} s):\n{self.tail()}")
            if time.monotonic() - told > _TELL_EVERY_S:
                told = time.monotonic()
                _log.warning(
                    "vLLM has been starting for %.0f s of at most %g; its log: %s", told - begun, seconds, self.log
                )
            await asyncio.sleep(0.5)

    def tail(self, lines: int = 25) -> str:
        """The end of its log."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def kill(self) -> None:
        """End it with all its processes; idempotent."""
        process, self._process = self._process, None
        if process is None:
            return
        end(process)
        self.socket.unlink(missing_ok=True)

    def remove(self) -> None:
        """End it and delete its folder."""
        self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)


def _signal(group: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, number)


def main(argv: Sequence[str]) -> None:
    """Become the server, or its keeper."""
    model = [argv[0]] if argv and not argv[0].startswith("-") else []
    parser = argparse.ArgumentParser(
        prog="python -m retool.engines.vllm_server",
        usage="%(prog)s MODEL|--share FOLDER [options] [more arguments of vLLM]",
        description="A vLLM server for engine.urls.",
        allow_abbrev=False,
    )
    parser.add_argument("--share", help="serve what a run with engine.share=FOLDER puts there, and wait for it")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument(
        "--health-port", type=int, help="with --share: answer /health there also while there is no model"
    )
    parser.add_argument("--dtype", help="default: float32, with --share what the run says")
    parser.add_argument("--context", type=int, help="longest trajectory; default: the model's, with --share the run's")
    parser.add_argument("--slots", type=int, help="sequences side by side; default: 64, with --share the run's")
    parser.add_argument("--cpu", action="store_true", help="settings for a machine without a GPU")
    parser.add_argument("--python", help="interpreter that has vLLM")
    known, more = parser.parse_known_args(argv[len(model) :])
    if bool(model) == bool(known.share):
        parser.error("name the model first, or give --share FOLDER, and not both")
    try:
        python = find_python(known.python)
    except UserError as error:
        parser.error(str(error))
    if known.share:
        from retool.engines.vllm_keeper import Keeper

        same = {key: getattr(known, key) for key in ("cpu", "dtype", "context", "slots")}
        share = Path(known.share).absolute()
        Keeper(share, python, known.host, known.port, more=more, **same).run(known.health_port)
        return
    plugin = write_plugin(Path(tempfile.mkdtemp(prefix="retool-vllm-")))
    command = arguments(
        model[0],
        where=["--host", known.host, "--port", str(known.port)],
        dtype=known.dtype or "float32",
        context=known.context,
        slots=known.slots or 64,
        cpu=known.cpu,
        more=more,
    )
    launch = str(plugin / "retool_vllm" / "launch.py")
    os.execve(python, [python, launch, *command], environment(plugin, cpu=known.cpu))


if __name__ == "__main__":
    main(sys.argv[1:])
