"""AdamW with fp32 master weights for low-precision parameters, clipping over all ranks, learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from retool.learner.shard import LOW, copy_into, full
from retool.learner.world import World


def lr_factor(step: int, warmup: int, total: int, schedule: Literal["constant", "cosine", "linear"]) -> float:
    """Multiplier of the learning rate for optimiser step `step` (from 0): linear warm-up, then the schedule to 0."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    done = min(1.0, (step - warmup) / max(1, total - warmup))
    return 0.5 * (1 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done


class Optimiser:
    """AdamW over one network. Weight decay spares vectors (norms, biases).

    A bf16 weight of 0.02 cannot take a step of 1e-6, so bf16 and fp16 parameters get an fp32 master copy and their
    gradients are gathered in fp32; parameters of higher precision are stepped directly.
    """

    def __init__(self, module: nn.Module, lr: float, betas: tuple[float, float], weight_decay: float) -> None:
        self.lr = lr
        self.names: list[str] = []
        self.params: list[nn.Parameter] = []
        self.masters: list[nn.Parameter] = []
        for name, param in module.named_parameters():
            if not param.requires_grad:
                continue
            self.names.append(name)
            self.params.append(param)
            self.masters.append(self._master(param))
        decay = [p for p in self.masters if p.dim() > 1]
        rest = [p for p in self.masters if p.dim() <= 1]
        groups = [{"params": decay, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]
        self.adam = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, fused=True)

    @staticmethod
    def _master(param: nn.Parameter) -> nn.Parameter:
        if param.dtype not in LOW:
            return param
        master = nn.Parameter(param.detach().float())

        def gather(p: Tensor) -> None:
            if p.grad is not None:
                grad = p.grad.float()
                master.grad = grad if master.grad is None else master.grad.add_(grad)
                p.grad = None

        param.register_post_accumulate_grad_hook(gather)
        return master

    def step(self, factor: float, clip: float, world: World) -> float:
        """Sums gradients over ranks, clips their norm, steps at `factor` times the learning rate.

        Returns the norm before clipping; when it is not finite nothing is changed and the caller must stop.
        """
        for param in self.masters:
            if param.grad is None:
                param.grad = torch.zeros_like(param)
        world.sum_([p.grad for p in self.masters if p.grad is not None and not isinstance(p.grad, DTensor)])
        norm = float(full(nn.utils.clip_grad_norm_(self.masters, clip)))
        if math.isfinite(norm):
            for group in self.adam.param_groups:
                group["lr"] = self.lr * factor
            self.adam.step()
            with torch.no_grad():
                for param, master in zip(self.params, self.masters):
                    if master is not param:
                        param.copy_(master)
        self.adam.zero_grad(set_to_none=True)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Moments, step counts and master weights by parameter name, whole; all ranks call it together."""
        out: dict[str, Tensor] = {}
        for name, param, master in zip(self.names, self.params, self.masters):
            for key, value in self.adam.state.get(master, {}).items():
                out[f"{name}/{key}"] = full(value)
            if master is not param:
                out[f"{name}/master"] = full(master)
        return out

    def load(self, state: dict[str, Tensor]) -> None:
        """Restores `state()`; parameters it does not name start fresh. Call after the weights were loaded."""
        self.adam.state.clear()
        for name, param, master in zip(self.names, self.params, self.masters):
            moments: dict[str, Any] = {}
            if f"{name}/step" in state:
                moments["step"] = state[f"{name}/step"].clone().to(master.device)
                for key in ("exp_avg", "exp_avg_sq"):
                    moments[key] = torch.zeros_like(master)
                    copy_into(moments[key], state[f"{name}/{key}"])
                self.adam.state[master] = moments
            if master is not param:
                copy_into(master, state.get(f"{name}/master", param.detach().float()))
