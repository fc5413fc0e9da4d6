"""What of a learner is written to disk and read again: checkpoints, the policy, the critic."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from retool.learner import checkpoint as ckpt
from retool.learner.value_model import MOMENTS, write_value_model
from retool.lora import merged, write_adapter
from retool.objectives import ObjectiveState

if TYPE_CHECKING:
    from retool.learner.learner import Learner

MASTER = "reference.master"


def save(learner: Learner, folder: Path) -> None:
    """Everything that `load` needs to go on with equal bits. All ranks call it; rank 0 writes, atomically."""
    files = {"rng": {"cpu": torch.get_rng_state()}}
    for name, role in learner.roles.items():
        if role.borrowed or (role.optimiser is None and name != "reference"):
            continue  # nobody trains it here
        files[name] = ckpt.learnt_tensors(role.module)
        if role.optimiser is not None:
            files[f"{name}.optimiser"] = role.optimiser.state()
    state = {"version": learner.version, "updates": learner.updates, "objective": learner.objective.name}
    if learner.moving is not None:
        state["reference_clock"] = learner.moving.clock
        if masters := learner.moving.state():
            files[MASTER] = masters

    def fill(target: Path) -> None:
        for name, tensors in files.items():
            ckpt.write_tensors(target / f"{name}.safetensors", tensors)
        ckpt.write_json(target / "state.json", {**state, "objective_state": learner.state.to_json()})

    _write(learner, folder, fill)


def load(learner: Learner, folder: Path) -> None:
    """Goes on where `save` was called. Weights are copied in place. Raises `CheckpointError` when it cannot be."""
    folder = ckpt.read_folder(Path(folder))
    data = ckpt.read_json(folder / "state.json")
    if data["objective"] != learner.objective.name:
        raise ckpt.CheckpointError(
            f"{folder} was trained with objective {data['objective']!r}, this recipe has {learner.objective.name!r}"
        )
    for name, role in learner.roles.items():
        if role.borrowed or (role.optimiser is None and name != "reference"):
            continue
        path = folder / f"{name}.safetensors"
        ckpt.load_module(role.module, ckpt.read_tensors(path), str(path))
        if role.optimiser is not None:
            role.optimiser.load(ckpt.read_tensors(folder / f"{name}.optimiser.safetensors"))
    if learner.moving is not None:
        if "reference_clock" not in data:
            raise ckpt.CheckpointError(f"{folder} was written with a frozen reference, this recipe has a moving one")
        masters = ckpt.read_tensors(folder / f"{MASTER}.safetensors") if learner.moving.state() else {}
        learner.moving.load(int(data["reference_clock"]), masters)
    torch.set_rng_state(ckpt.read_tensors(folder / "rng.safetensors")["cpu"])
    learner.version, learner.updates = int(data["version"]), int(data["updates"])
    learner.state = ObjectiveState.from_json(data["objective_state"])


def full_weights(learner: Learner) -> dict[str, Tensor]:
    """The policy's weights by name, whole, on the CPU; all ranks call it."""
    return ckpt.module_tensors(learner.policy.module)


def save_model(learner: Learner, folder: Path) -> None:
    """The policy as an ordinary transformers folder, with its tokenizer; adapters are added to the weights."""
    module = learner.policy.module
    weights = merged(module, full_weights(learner))

    def fill(target: Path) -> None:
        module.save_pretrained(target, state_dict=weights)
        if learner.tokenizer is not None:
            learner.tokenizer.save_pretrained(target)

    _write(learner, folder, fill)


def save_adapter(learner: Learner, folder: Path) -> None:
    """The policy's adapters alone, as peft saves them."""
    weights = ckpt.learnt_tensors(learner.policy.module)
    _write(learner, folder, lambda target: write_adapter(learner.policy.module, weights, target))


def save_critic(learner: Learner, folder: Path, kind: str) -> None:
    """The critic as a value-model folder; `kind` says what it is (`critic`, `reward_model`)."""
    module = learner.roles["critic"].module
    tensors = merged(module, ckpt.module_tensors(module))
    moments = {name: getattr(learner.state, name) for name in MOMENTS}

    def fill(target: Path) -> None:
        write_value_model(target, module, tensors, {"kind": kind, **moments})
        if learner.tokenizer is not None:
            learner.tokenizer.save_pretrained(target)

    _write(learner, folder, fill)


def with_moments(state: ObjectiveState, other: ObjectiveState) -> ObjectiveState:
    """`state` with the moments of returns of `other`."""
    return replace(state, **{name: getattr(other, name) for name in MOMENTS})


def _write(learner: Learner, folder: Path, fill: Callable[[Path], None]) -> None:
    if learner.world.rank == 0:
        ckpt.write_folder(Path(folder), fill)
    learner.world.barrier()
