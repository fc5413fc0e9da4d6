"""One rank of `test_two_ranks`: takes a step with its share of the micro-batches and writes loss and gradients."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from retool.learner import World
from retool.learner.checkpoint import module_tensors
from tests.learner.build_runs import busy_ppo, keeper, losses, rollout_for


def main(folder: Path, names: list[str], whole_only: list[str]) -> None:
    """`names` with whole and with sharded networks, `whole_only` with whole ones."""
    torch.set_num_threads(1)
    world = World.from_env()
    assert world.size == 2
    for shard in ("none", "fsdp"):
        for name in (*names, *whole_only) if shard == "none" else names:
            learner = keeper(name, folder, world, micro_samples=4, shard=shard)
            metrics = learner.step(rollout_for(name))
            values = {f"value/{k}": torch.tensor(v, dtype=torch.float64) for k, v in losses(metrics).items()}
            save_file({**learner.gradients, **values}, folder / f"{name}-{shard}-{world.rank}.safetensors")
        resumed(shard, folder, world)
    world.barrier()
    dist.destroy_process_group()
    os._exit(0)  # everything is written; torch's threads now and then abort an interpreter that takes itself down


def resumed(shard: str, folder: Path, world: World) -> None:
    """Two steps with a checkpoint in between; the second one again from the checkpoint. Saves both policies."""
    for name in ("whole", "resumed"):
        made = busy_ppo(folder, world, shard=shard)
        if name == "whole":
            made.step(rollout_for("ppo_rlhf", 1))
            made.save(folder / f"checkpoint-{shard}")
        else:
            made.load(folder / f"checkpoint-{shard}")
        made.step(rollout_for("ppo_rlhf", 2))
        made.save_model(folder / f"{shard}-{name}")
        reference = module_tensors(made.roles["reference"].module)
        if world.rank == 0:
            save_file(reference, folder / f"{shard}-{name}-reference.safetensors")
    made.save_critic(folder / f"critic-{shard}")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2].split(","), sys.argv[3].split(","))
