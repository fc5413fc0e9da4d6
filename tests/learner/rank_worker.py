"""One rank of `test_two_ranks`: takes a step with its share of the micro-batches and writes loss and gradients."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from retool.learner import World
from tests.learner.build_runs import keeper, losses, rollout_for


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    world = World.from_env()
    assert world.size == 2
    for name in names:
        learner = keeper(name, folder, world, micro_samples=4)
        metrics = learner.step(rollout_for(name))
        values = {f"value/{k}": torch.tensor(v, dtype=torch.float64) for k, v in losses(metrics).items()}
        save_file({**learner.gradients, **values}, folder / f"{name}-{world.rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
