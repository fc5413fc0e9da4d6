"""The learner's weights on their way to vLLM servers, version by version. Here: files in a folder that both see, one
folder a version. Over a process group: vllm_group.py."""

from __future__ import annotations

import hashlib
import shutil
import tempfile
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import torch

from retool.engines.vllm_adapter import How, Server
from retool.errors import UserError
from retool.lora import base_tensors, has_adapters, merged, write_adapter

LORA_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM makes room for


class Weights:
    """`model`'s weights, as they are when `save` is called. `tag`: of that version."""

    def __init__(self, model: Any, how: How) -> None:
        self.how: How = how
        self.tag = ""
        self.run = uuid.uuid4().hex[:8]
        self._model = model
        self._count = 0
        self._seen: tuple[int, ...] = ()

    def save(self, startable: bool) -> Path | None:
        """They are a new version, with a new tag; gives back the folder of the version before, for `drop`.
        `startable`: a server may have to start from them."""
        self._count += 1
        self.tag = f"{self.run}.{self._count}"
        self._seen = self._counters()
        return None

    async def install(self, server: Server, asleep: bool) -> None:
        """Bring the newest version to a server. Raises `EngineError`."""
        raise NotImplementedError

    @property
    def start(self) -> str | None:
        """The folder that a server can be started from; None: where it was started first."""
        return None

    @property
    def current(self) -> bool:
        """Whether the learner still has the version that was saved last."""
        return self._seen == self._counters()

    def _counters(self) -> tuple[int, ...]:
        """Of changes in place, which is how optimisers and `load_state_dict` change weights."""
        return tuple(p._version for p in self._model.parameters())

    def close(self) -> None:
        """Leave nothing behind."""
        raise NotImplementedError

    @torch.no_grad()
    def logprobs(self, ids: list[int], start: int) -> list[float]:
        """Log-probs of `ids[start:]` under the learner's weights."""
        device = next(self._model.parameters()).device
        logits = self._model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0].float()
        logp = torch.log_softmax(logits[start - 1 : -1], -1)
        return [float(x) for x in logp.gather(-1, torch.tensor(ids[start:], device=device)[:, None])[:, 0]]


class WeightFiles(Weights):
    """Writes weights into `share` (default: a temporary folder, in memory where the system has one).

    `how`: `adapter` writes the adapters alone, `file` and `reload` whole weights with the adapters added. `folder`: of
    the newest version.
    """

    def __init__(self, model: Any, tokenizer: Any, share: str | Path | None, how: How) -> None:
        if how == "adapter" and not has_adapters(model):
            raise ValueError("weight_sync adapter needs a model with adapters")
        super().__init__(model, how)
        self.folder: Path | None = None
        self._tokenizer = tokenizer
        self._own = share is None
        self._share = Path(share) if share is not None else _temporary()

    def save(self, startable: bool) -> Path | None:
        super().save(startable)
        old, self.folder = self.folder, self._share / f"weights-{self.tag}"
        if self.how == "adapter":
            write_adapter(self._model, self._model.state_dict(), self.folder)
            return old
        save_merged(self._model, self.folder)
        if startable:
            self._tokenizer.save_pretrained(self.folder)
        return old

    async def install(self, server: Server, asleep: bool) -> None:
        take = {"adapter": server.take_adapter, "reload": server.reload}.get(self.how, server.take_files)
        await server.load(partial(take, str(self.folder), self.tag), asleep)

    @property
    def start(self) -> str | None:
        return None if self.how == "adapter" else str(self.folder)

    def close(self) -> None:
        """Delete what was written."""
        drop(self._share if self._own else self.folder)


def drop(folder: Path | None) -> None:
    """Delete a folder, if there is one."""
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)


def save_merged(model: Any, folder: Path) -> None:
    """An ordinary model folder; adapters are added to the weights."""
    if has_adapters(model):
        model.save_pretrained(folder, state_dict=merged(model, model.state_dict()))
    else:
        model.save_pretrained(folder)


def save_base(model: Any, folder: Path) -> None:
    """An ordinary model folder of what the adapters were put on."""
    model.save_pretrained(folder, state_dict=base_tensors(model.state_dict()))


def digest_of_base(model: Any) -> str:
    """Names the very weights that adapters were put on: only a server that has them can take the adapters."""
    found = hashlib.sha256()
    for name, tensor in sorted(base_tensors(model.state_dict()).items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def lora_arguments(rank: int) -> list[str]:
    """What a vLLM server needs to take adapters of that rank. Raises `UserError` when it cannot."""
    room = next((r for r in LORA_RANKS if r >= rank), None)
    if room is None:
        raise UserError(
            f"model.lora.rank is {rank}: vLLM takes adapters up to rank {LORA_RANKS[-1]}; set engine.weight_sync=file"
        )
    return ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(room)]


def _temporary() -> Path:
    """A private folder, in memory where the system has one."""
    memory = Path("/dev/shm")
    return Path(tempfile.mkdtemp(prefix="retool-weights-", dir=memory if memory.is_dir() else None))
