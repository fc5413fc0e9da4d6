"""Low-rank adapters (LoRA, 2106.09685): the model is frozen, and beside each of its linear layers a thin product of two
matrices learns: W x + (alpha / rank) B A x. B starts at zero, so that a fresh adapter changes nothing.

An adapted layer keeps the names `weight` and `bias` of the layer it stands for, so the base's names stay what they
were; what learns is called `lora_A` [rank, in] and `lora_B` [out, rank]. On disk adapters have the names and the
configuration of the peft library, which vLLM and others read.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from retool.config import LoraConfig
from retool.errors import UserError

_PARTS = ("lora_A", "lora_B")


class LoraLinear(nn.Module):
    """A linear layer with an adapter. `active`: whether the adapter counts."""

    def __init__(self, base: nn.Linear, config: LoraConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.in_features, self.out_features = base.in_features, base.out_features
        self.rank, self.alpha = config.rank, config.alpha
        self.weight, self.bias = base.weight, base.bias
        bound = base.in_features**-0.5
        first = torch.empty(config.rank, base.in_features).uniform_(-bound, bound, generator=generator)
        self.lora_A = nn.Parameter(first.to(base.weight))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, config.rank))
        self.active = True

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]"""
        out = nn.functional.linear(x, self.weight, self.bias)
        if not self.active:
            return out
        return out + self.scale * nn.functional.linear(nn.functional.linear(x, self.lora_A), self.lora_B)


def add_adapters(model: Any, config: LoraConfig, seed: int) -> None:
    """Freezes `model` and puts adapters into the linear layers of its blocks, in place; equal seeds give equal ones.
    Raises `UserError` when a target names no layer."""
    blocks = max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())
    found = [
        (parent, leaf, layer)
        for parent in blocks.modules()
        for leaf, layer in parent.named_children()
        if isinstance(layer, nn.Linear)
    ]
    known = sorted({leaf for _, leaf, _ in found})
    unknown = sorted(set(config.targets) - set(known))
    if unknown or not found:
        raise UserError(
            f"model.lora.targets: this model has no linear layer {', '.join(map(repr, unknown)) or 'in its blocks'}; "
            f"it has {', '.join(known) or 'none'}"
        )
    model.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for parent, leaf, layer in found:
        if not config.targets or leaf in config.targets:
            setattr(parent, leaf, LoraLinear(layer, config, generator))


def adapters(module: nn.Module) -> dict[str, LoraLinear]:
    """The adapted layers by name; empty for a model without."""
    return {name: m for name, m in module.named_modules() if isinstance(m, LoraLinear)}


def has_adapters(module: nn.Module) -> bool:
    return any(isinstance(m, LoraLinear) for m in module.modules())


def is_adapter(name: str) -> bool:
    """Whether a parameter of that name belongs to an adapter."""
    return name.rsplit(".", 1)[-1] in _PARTS


def freeze_base(module: nn.Module) -> None:
    """In a network with adapters only they learn; one without is left as it is."""
    if has_adapters(module):
        for name, param in module.named_parameters():
            param.requires_grad_(is_adapter(name))


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """The network computes what its base computes."""
    layers = list(adapters(module).values())
    for layer in layers:
        layer.active = False
    try:
        yield
    finally:
        for layer in layers:
            layer.active = True


def base_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What remains of named tensors without adapters."""
    return {name: t for name, t in tensors.items() if not is_adapter(name)}


def merged(module: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`tensors` (of `module`, by its names) with every adapter added to its layer's weight, in fp32 or wider. Without
    adapters: the same."""
    out = base_tensors(tensors)
    for name, layer in adapters(module).items():
        weight, a, b = (tensors[f"{name}.{part}"].detach() for part in ("weight", *_PARTS))
        wide = torch.promote_types(weight.dtype, torch.float32)
        out[f"{name}.weight"] = (weight.to(wide) + layer.scale * (b.to(wide) @ a.to(wide))).to(weight.dtype)
    return out


def write_adapter(model: Any, tensors: Mapping[str, Tensor], folder: Path) -> None:
    """Fills a folder with the adapters of `model`, whose values are in `tensors` (by its names), as peft names them."""
    layers = adapters(model)
    one = next(iter(layers.values()))
    folder.mkdir(parents=True, exist_ok=True)
    named = {
        f"base_model.model.{name}.{part}.weight": tensors[f"{name}.{part}"].detach().cpu().contiguous()
        for name in layers
        for part in _PARTS
    }
    save_file(named, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    about = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(getattr(model, "name_or_path", "") or "") or None,
        "r": one.rank,
        "lora_alpha": one.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in layers}),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
