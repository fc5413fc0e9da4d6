"""The networks of a learner: policy, critic, reference. All run without dropout: it would make ratios lie."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from retool.learner.head import Head
from retool.learner.layout import Inputs
from retool.learner.optimiser import Optimiser
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


class ValueModel(nn.Module):
    """A backbone with a scalar head, which starts at zero: V = 0 everywhere before the first update."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        weight = next(backbone.parameters())
        width = backbone.config.get_text_config().hidden_size
        self.head = nn.Linear(width, 1, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, inputs: Inputs, index: Tensor) -> tuple[Tensor, Tensor]:
        """(values of the states before the targets `index` [M], values after each sample's last token [B])."""
        hidden = last_hidden(self.backbone, inputs)
        before = hidden.index_select(0, inputs.source[index] - 1)
        return self._scalar(before), self._scalar(hidden.index_select(0, inputs.last))

    def _scalar(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.head(hidden)[:, 0].clone()  # FSDP hooks want no views
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out


def last_hidden(backbone: Any, inputs: Inputs) -> Tensor:
    """[R·L, H] hidden states of all input positions."""
    extra = {} if inputs.position_ids is None else {"position_ids": inputs.position_ids}
    out: Tensor = backbone(input_ids=inputs.ids, use_cache=False, **extra).last_hidden_state
    return out.reshape(-1, out.shape[-1])


@dataclass
class Role:
    """One network and what trains it. `net` is called; `module` (the transformers model, or the `ValueModel`) is what
    is saved; `optimiser` is None for a frozen one."""

    name: str
    net: Any
    module: Any
    optimiser: Optimiser | None = None

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

    def value(self, inputs: Inputs, action: Tensor) -> tuple[Forward, Tensor]:
        """(values of the states before the action tokens, [B] values of the states after each sample's last token)."""
        index = torch.nonzero(action)[:, 0]
        values, after = self.net(inputs, index)
        return Forward(value=scatter(values, index, len(action))), after


def scatter(values: Tensor, index: Tensor, n: int) -> Tensor:
    """[M] values at positions `index` of [n] zeros."""
    return torch.zeros(n, dtype=values.dtype, device=values.device).index_copy(0, index, values)


def language_role(name: str, model: Any, temperature: float) -> Role:
    """The policy (the caller's object, so an engine may share it) or the reference; without optimiser yet."""
    return Role(name, LanguageNet(model, temperature).eval(), model)


def frozen_copy(model: Any) -> Any:
    """The policy as it is now, for good."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def critic_role(model: Any) -> Role:
    """A critic that starts from the policy's backbone; without optimiser yet."""
    critic = ValueModel(copy.deepcopy(model.base_model)).eval().requires_grad_(True)
    return Role("critic", critic, critic)


def silence_dropout(model: nn.Module) -> None:
    """Every dropout probability to zero, so that even train mode (which activation checkpointing needs) is exact."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
