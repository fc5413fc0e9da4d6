"""The networks of a learner: policy, critic, reference. All run without dropout: it would make ratios lie."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retool.learner.head import Head
from retool.learner.layout import Inputs
from retool.learner.optimiser import Optimiser
from retool.learner.value_model import ValueModel, last_hidden
from retool.lora import adapters_off, freeze_base
from retool.objectives import Forward


class LanguageNet(nn.Module):
    """A causal language model that answers with log-probs of chosen targets instead of logits.

    Backbone and head run inside one `forward`, so that a sharded model has all its weights there.
    """

    def __init__(self, model: Any, temperature: float) -> None:
        super().__init__()
        self.model = model
        self.head = Head(model, temperature)

    def forward(self, inputs: Inputs, index: Tensor, entropy: bool, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        """`index` [M]: which targets -> (log-probs [M], entropies [M])."""
        states = last_hidden(self.model.base_model, inputs).index_select(0, inputs.source[index] - 1)
        return self.head(states, inputs.targets[index], entropy, entropy_grad)


class BaseNet(LanguageNet):
    """What a model with adapters computes without them."""

    def forward(self, inputs: Inputs, index: Tensor, entropy: bool, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        with adapters_off(self.model):
            return super().forward(inputs, index, entropy, entropy_grad)


@dataclass
class Role:
    """One network and what trains it. `net` is called; `module` (the transformers model, or the `ValueModel`) is what
    is saved, unless it is `borrowed` from another role; `optimiser` is None for a frozen one."""

    name: str
    net: Any
    module: Any
    optimiser: Optimiser | None = None
    borrowed: bool = False

    @property
    def model(self) -> Any:
        """The transformers model (policy, reference) or `ValueModel` (critic)."""
        return self.module

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.module.parameters()).device
        return device

    def logp(self, inputs: Inputs, action: Tensor, entropy: bool = False, entropy_grad: bool = False) -> Forward:
        """Log-probs (and entropies) of the action tokens of a micro-batch; `action` [n] bool over its targets."""
        index = torch.nonzero(action)[:, 0]
        logp, ent = self.net(inputs, index, entropy, entropy_grad)
        return Forward(
            logp=scatter(logp, index, len(action)), entropy=scatter(ent, index, len(action)) if entropy else None
        )

    def value(self, inputs: Inputs, action: Tensor) -> Forward:
        """Values of the states before the action tokens, and of the states after each sample's last token."""
        index = torch.nonzero(action)[:, 0]
        values, after = self.net(inputs, index)
        return Forward(value=scatter(values, index, len(action)), after=after)

    @contextmanager
    def at_temperature(self, temperature: float) -> Iterator[None]:
        """Log-probs are taken at another temperature inside; the backward pass must happen inside as well."""
        before, self.net.head.temperature = self.net.head.temperature, temperature
        try:
            yield
        finally:
            self.net.head.temperature = before


def scatter(values: Tensor, index: Tensor, n: int) -> Tensor:
    """[M] values at positions `index` of [n] zeros."""
    return torch.zeros(n, dtype=values.dtype, device=values.device).index_copy(0, index, values)


def language_role(name: str, model: Any, temperature: float) -> Role:
    """The policy (the caller's object, so an engine may share it) or the reference; without optimiser yet."""
    return Role(name, LanguageNet(model, temperature).eval(), model)


def base_role(name: str, model: Any, temperature: float) -> Role:
    """The model that the policy's adapters were put on: the policy itself without them, so it takes no memory."""
    return Role(name, BaseNet(model, temperature).eval(), model, borrowed=True)


def frozen_copy(model: Any) -> Any:
    """The policy as it is now, for good."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def critic_role(model: Any) -> Role:
    """A critic that starts from the policy's backbone; without optimiser yet."""
    return value_role(ValueModel(copy.deepcopy(model.base_model)))


def value_role(critic: ValueModel) -> Role:
    """The role of a critic or reward model; without optimiser yet."""
    critic.eval().requires_grad_(True)
    freeze_base(critic.backbone)
    return Role("critic", critic, critic)


def silence_dropout(model: nn.Module) -> None:
    """Every dropout probability to zero, so that even train mode (which activation checkpointing needs) is exact."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
