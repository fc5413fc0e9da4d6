"""The `engine` section of a recipe: what turns weights into tokens, and how a served engine gets new weights."""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from retool.config.base import Section

_HOST = re.compile(r"([\w.-]+|\[[0-9a-fA-F:.]+\])(:\d{1,5})?")


class EngineConfig(Section):
    """What turns weights into tokens."""

    kind: Literal["transformers", "vllm"] = "transformers"
    """`transformers` is embedded. `vllm` is served: by servers at `urls`, or by one that this run starts and stops."""
    slots: int = Field(64, ge=1)
    """Trajectories decoded side by side."""
    context: int | None = Field(None, ge=16)
    """Longest trajectory in tokens; default: what the model allows."""
    urls: tuple[str, ...] = ()
    """vLLM servers (`http://HOST:PORT`), started with `python -m retool.engines.vllm_server`; sessions go to the least
    loaded one and stay there."""
    python: str | None = None
    """Interpreter that has vLLM, for a server started here; default: $RETOOL_VLLM_PYTHON, .venv-vllm/bin/python, or
    the one that runs retool."""
    weight_sync: Literal["auto", "file", "reload", "adapter", "nccl", "gloo", "ipc"] = "auto"
    """How new weights reach vLLM. `file`: safetensors in `share`, loaded in place by every worker. `reload`: the same
    file through vLLM's own `reload_weights` (not for tied embeddings on CPU, which the probe would refuse). `adapter`:
    only the adapters of `model.lora`, for servers that have the very model that they were put on. `auto`: `adapter`
    with `model.lora` and without `urls`, else `file` (adapters are merged on the way). `nccl`, `gloo`: broadcast by the
    learner to the workers of each server, from GPU to GPU or over the network; no shared folder is needed. `ipc`:
    through memory of a GPU that learner and server share."""
    sync_host: str | None = None
    """HOST or HOST:PORT of this machine, where the servers of `nccl` and `gloo` find the learner; default: the address
    that a server sees, 127.0.0.1 for one that is started here, and any free port."""
    sync_s: float = Field(300.0, gt=0)
    """Seconds that a bucket of weights (256 MiB) may take over `nccl`, `gloo` or `ipc` before the server counts as
    broken."""
    share: str | None = None
    """Folder for weights that learner and servers both see at the same path; default: a temporary one (one machine)."""
    probe_tolerance: float | None = Field(None, gt=0)
    """Largest difference of log-probs between learner and server after a sync before the run stops; default: 1e-3 for
    float32 weights, 0.2 for bfloat16."""
    server_args: tuple[str, ...] = ()
    """More arguments for a vLLM server that is started here, e.g. [--gpu-memory-utilization, "0.4"]."""
    sleep: bool | None = None
    """Whether vLLM gives its GPU memory back while the learner works (`--enable-sleep-mode`); default: a server that is
    started here on a GPU does."""
    start_s: float = Field(600.0, gt=0)
    """Seconds a server may take until it answers."""
    turn_s: float = Field(600.0, gt=0)
    """Seconds a server may stay silent within a turn before it counts as broken."""

    @model_validator(mode="after")
    def _kind_fits(self) -> EngineConfig:
        own = ("urls", "python", "share", "probe_tolerance", "server_args", "sleep", "sync_host")
        given = [k for k in own if getattr(self, k)]
        if self.kind != "vllm" and given:
            raise ValueError(f"engine.{given[0]} needs engine.kind vllm")
        groups = self.weight_sync in ("nccl", "gloo")
        if self.sync_host is not None and (not groups or not _HOST.fullmatch(self.sync_host)):
            raise ValueError("engine.sync_host: HOST or HOST:PORT, and engine.weight_sync nccl or gloo with it")
        if self.weight_sync == "ipc" and self.urls:
            raise ValueError("engine.weight_sync ipc is for a server that is started here, not for engine.urls")
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"engine.urls: {url!r}: write http://HOST:PORT or https://HOST")
        if self.urls and self.share is None and not groups:
            raise ValueError(
                "engine.urls needs engine.share, a folder that this process and the servers both see, or "
                "engine.weight_sync gloo or nccl"
            )
        if self.urls and (self.python or self.server_args):
            raise ValueError("engine.python and engine.server_args are for a server started here, not for engine.urls")
        return self
