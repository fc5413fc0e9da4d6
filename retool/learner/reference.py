"""References that move: an average of the policy's past, or a copy taken now and then (A §2.1, A.7)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from retool.learner.roles import Role
from retool.learner.shard import LOW, copy_into, full
from retool.objectives import Reference


class MovingReference:
    """Moves a reference towards the policy. `clock`: events counted so far.

    A bf16 weight of 1.0 cannot take an averaging step of 1e-5, so low-precision references are averaged in an fp32
    master copy, towards the policy's own fp32 masters. Every rank moves its own shard.
    """

    def __init__(self, rule: Reference, policy: Role, reference: Role) -> None:
        if policy.optimiser is None:
            raise ValueError("a reference follows a policy that learns")
        self.rule = rule
        self.clock = 0
        own = dict(reference.module.named_parameters())
        self.sources = dict(zip(policy.optimiser.names, policy.optimiser.masters))
        self.targets = {name: own[name] for name in self.sources}
        self.masters: dict[str, Tensor] = {
            name: p.detach().float() if p.dtype in LOW else p for name, p in self.targets.items()
        }

    def tick(self, event: Literal["update", "rollout"]) -> bool:
        """Tells it that the policy made an optimiser step, or finished a rollout; whether the reference moved."""
        if event != self.rule.after:
            return False
        self.clock += 1
        if self.clock % self.rule.every:
            return False
        share = self.rule.share
        with torch.no_grad():
            for name, source in self.sources.items():
                master, target = self.masters[name], self.targets[name]
                if share == 1.0:
                    master.copy_(source)
                else:
                    master.add_(source.to(master.dtype) - master, alpha=share)
                if master is not target:
                    target.copy_(master)
        return True

    def state(self) -> dict[str, Tensor]:
        """The masters that are not the reference's own weights, whole; all ranks call it together."""
        return {name: full(m) for name, m in self.masters.items() if m is not self.targets[name]}

    def load(self, clock: int, state: dict[str, Tensor]) -> None:
        """Restores `clock` and `state()`; call after the reference's weights were loaded."""
        self.clock = clock
        for name, master in self.masters.items():
            if master is not self.targets[name]:
                copy_into(master, state[name])
