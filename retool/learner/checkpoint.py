"""Checkpoints without pickle: safetensors for numbers, JSON for the rest, written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from retool.errors import UserError
from retool.learner.shard import copy_into, full
from retool.lora import has_adapters, is_adapter

FORMAT = 1


class CheckpointError(UserError):
    """A checkpoint that cannot be read or belongs to something else."""


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """`fill` writes into a temporary sibling that then takes the name `folder`; an older one is replaced.

    A crash leaves the old folder, the new one, or (between two renames) the old one as `.NAME.old`, which `read_folder`
    finds.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    tmp, old = folder.with_name(f".{folder.name}.tmp"), folder.with_name(f".{folder.name}.old")
    for stale in (tmp, old):
        if stale.exists() and (stale is tmp or folder.exists()):
            shutil.rmtree(stale)
    tmp.mkdir()
    fill(tmp)
    for path in tmp.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync(tmp)
    if folder.exists():
        folder.replace(old)
    tmp.replace(folder)
    _sync(folder.parent)
    if old.exists():
        shutil.rmtree(old)


def read_folder(folder: Path) -> Path:
    """The folder to read: itself, or the predecessor that an interrupted replacement left behind."""
    folder = Path(folder)
    old = folder.with_name(f".{folder.name}.old")
    if not folder.exists() and old.exists():
        return old
    if not (folder / "state.json").is_file():
        raise CheckpointError(f"{folder} is not a learner checkpoint (no state.json)")
    return folder


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def module_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters (tied ones once) and persistent buffers by name, whole, on the CPU; all ranks call it together."""
    state = set(module.state_dict(keep_vars=True))
    named = dict(module.named_parameters())
    named |= {name: buffer for name, buffer in module.named_buffers() if name in state}  # type: ignore[misc]
    return {name: full(tensor) for name, tensor in named.items()}


def learnt_names(module: nn.Module) -> set[str]:
    """What a checkpoint holds of a network: all that `module_tensors` gives; with adapters only what learns, because
    the rest is the model that training started from."""
    if has_adapters(module):
        return {name for name, p in module.named_parameters() if p.requires_grad or is_adapter(name)}
    persistent = set(module.state_dict(keep_vars=True))
    return {n for n, _ in module.named_parameters()} | {n for n, _ in module.named_buffers() if n in persistent}


def learnt_tensors(module: nn.Module) -> dict[str, Tensor]:
    """The tensors of `learnt_names`, whole, on the CPU; all ranks call it together."""
    if has_adapters(module):
        named = dict(module.named_parameters())
        return {name: full(named[name]) for name in sorted(learnt_names(module))}
    return module_tensors(module)


def load_module(module: nn.Module, tensors: Mapping[str, Tensor], where: str) -> None:
    """Copies into the existing tensors, so that whoever shares them sees the new values. `tensors`: what
    `learnt_tensors` gave."""
    mine = dict(module.named_parameters()) | dict(module.named_buffers())
    expected = learnt_names(module)
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))[:3]
        raise CheckpointError(f"{where} was written for another model: {odd} differ")
    for name, tensor in tensors.items():
        if mine[name].shape != tensor.shape:
            raise CheckpointError(
                f"{where}: {name} is {tuple(tensor.shape)} there and {tuple(mine[name].shape)} in this model"
            )
        copy_into(mine[name], tensor)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Named tensors; none may share memory with another."""
    save_file({name: t.detach().cpu().contiguous() for name, t in tensors.items()}, path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Raises `CheckpointError` when the file is missing."""
    if not path.is_file():
        raise CheckpointError(f"the checkpoint lacks {path.name}: it was written by a run with other networks")
    tensors: dict[str, Tensor] = load_file(path)
    return tensors


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.write_text(json.dumps({"format": FORMAT, **data}, indent=1, sort_keys=True), encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Raises `CheckpointError` on another format version."""
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if data.get("format") != FORMAT:
        raise CheckpointError(f"{path} has format {data.get('format')}, this version reads {FORMAT}")
    return data
