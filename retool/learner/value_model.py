"""A backbone with a scalar head: critic and reward model are the same network, saved in the same kind of folder.

config.json, model.safetensors   the backbone, as transformers saves it
value_head.safetensors           weight and bias of the scalar head
value_model.json                 what it is, and the moments of the returns it was trained to predict
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel

from retool.learner import checkpoint as ckpt
from retool.learner.layout import Inputs

HEAD, ABOUT = "value_head.safetensors", "value_model.json"
MOMENTS = ("value_mean", "value_square", "value_weight")


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


def write_value_model(folder: Path, model: ValueModel, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Fills a folder. `tensors`: the whole network by name (`module_tensors`). `about`: `kind`, and moments if any."""
    backbone = {n.removeprefix("backbone."): t for n, t in tensors.items() if n.startswith("backbone.")}
    model.backbone.save_pretrained(folder, state_dict=backbone)
    ckpt.write_tensors(folder / HEAD, {n: tensors[f"head.{n}"] for n in ("weight", "bias")})
    ckpt.write_json(folder / ABOUT, about)


def read_value_model(path: str | Path, policy: Any) -> tuple[ValueModel, dict[str, float]]:
    """(the network on the policy's device and in its type, moments of the returns: empty when it has none).

    `path` is a folder of a value model, or a learner checkpoint with a critic of the policy's architecture. Raises
    `CheckpointError` when it holds neither, or a model with another vocabulary.
    """
    folder = Path(path).expanduser()
    weight = next(policy.parameters())
    if (folder / ABOUT).is_file():
        about = ckpt.read_json(folder / ABOUT)
        backbone = AutoModel.from_pretrained(
            str(folder), dtype=weight.dtype, attn_implementation="sdpa", trust_remote_code=False
        )
        model = ValueModel(backbone)
        with torch.no_grad():
            for name, tensor in ckpt.read_tensors(folder / HEAD).items():
                getattr(model.head, name).copy_(tensor)
    elif (folder / "critic.safetensors").is_file():
        about = ckpt.read_json(folder / "state.json")["objective_state"]
        model = ValueModel(type(policy.base_model)(policy.config))
        model.to(weight.dtype)
        ckpt.load_module(model, ckpt.read_tensors(folder / "critic.safetensors"), str(folder))
    else:
        raise ckpt.CheckpointError(
            f"objective.critic.path: {str(folder)!r} holds no value model ({ABOUT}) and no learner checkpoint with a "
            "critic (critic.safetensors); train a reward model with `retool sft` and sft.head, or name RUN/critic"
        )
    mine, other = policy.get_input_embeddings().num_embeddings, model.backbone.get_input_embeddings().num_embeddings
    if other < mine:
        raise ckpt.CheckpointError(
            f"objective.critic.path: {str(folder)!r} knows {other} tokens, the policy {mine}: they need one tokenizer"
        )
    moments = {k: float(about[k]) for k in MOMENTS if k in about}
    return model.to(weight.device), moments if moments.get("value_weight") else {}
