"""The networks of a learner: policy, critic, reference. All run in eval mode: dropout would make ratios lie."""

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


class ValueModel(nn.Module):
    """A backbone with a scalar head, which starts at zero: V = 0 everywhere before the first update."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone
        weight = next(backbone.parameters())
        self.head = nn.Linear(
            backbone.config.get_text_config().hidden_size, 1, device=weight.device, dtype=weight.dtype
        )
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)


@dataclass
class Role:
    """One network and what trains it; `optimiser` is None for a frozen one. `module` is what is saved."""

    name: str
    module: Any
    optimiser: Optimiser | None = None
    head: Head | None = None

    @property
    def model(self) -> Any:
        """The transformers model (policy, reference) or `ValueModel` (critic)."""
        return self.module

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def hidden(self, inputs: Inputs) -> Tensor:
        """[R·L, H] last hidden states of all input positions."""
        backbone = self.module.backbone if isinstance(self.module, ValueModel) else self.module.base_model
        extra = {} if inputs.position_ids is None else {"position_ids": inputs.position_ids}
        out: Tensor = backbone(input_ids=inputs.ids, use_cache=False, **extra).last_hidden_state
        return out.reshape(-1, out.shape[-1])

    def logp(self, inputs: Inputs, action: Tensor, entropy: bool = False, entropy_grad: bool = False) -> Forward:
        """Log-probs (and entropies) of the action tokens of a micro-batch; `action` [n] bool over its targets."""
        if self.head is None:
            raise ValueError(f"the {self.name} has no language-model head")
        index = torch.nonzero(action)[:, 0]
        states = self.hidden(inputs).index_select(0, inputs.source[index] - 1)
        logp, ent = self.head(states, inputs.targets[index], entropy, entropy_grad)
        zeros = torch.zeros(len(action), dtype=logp.dtype, device=logp.device)
        return Forward(
            logp=zeros.index_copy(0, index, logp), entropy=zeros.index_copy(0, index, ent) if entropy else None
        )

    def value(self, inputs: Inputs, action: Tensor) -> tuple[Forward, Tensor]:
        """(values of the states before the action tokens, [B] values of the states after each sample's last token)."""
        hidden = self.hidden(inputs)
        index = torch.nonzero(action)[:, 0]
        values = self._scalar(hidden.index_select(0, inputs.source[index] - 1))
        zeros = torch.zeros(len(action), dtype=values.dtype, device=values.device)
        return Forward(value=zeros.index_copy(0, index, values)), self._scalar(hidden.index_select(0, inputs.last))

    def _scalar(self, hidden: Tensor) -> Tensor:
        out: Tensor = self.module.head(hidden)[:, 0]
        return out.float() if out.dtype in (torch.bfloat16, torch.float16) else out


def policy_role(model: Any, optimiser: Optimiser, temperature: float) -> Role:
    """The trained language model; the caller's object, so an engine may share it."""
    return Role("policy", model, optimiser, Head(model, temperature))


def reference_role(model: Any, temperature: float) -> Role:
    """A frozen copy of the policy as it is now."""
    frozen = copy.deepcopy(model).eval().requires_grad_(False)
    return Role("reference", frozen, None, Head(frozen, temperature))


def value_model(model: Any) -> ValueModel:
    """A critic that starts from the policy's backbone."""
    critic = ValueModel(copy.deepcopy(model.base_model)).eval()
    return critic.requires_grad_(True)


def silence_dropout(model: nn.Module) -> None:
    """Every dropout probability to zero, so that even train mode (which activation checkpointing needs) is exact."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # type: ignore[assignment]
