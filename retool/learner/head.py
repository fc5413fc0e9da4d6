"""Log-probs and entropies of target tokens from hidden states, a chunk of tokens at a time.

`[tokens, vocabulary]` in fp32 exists for one chunk only, in the backward pass as well: each chunk is recomputed there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from retool.errors import UserError

CHUNK_ELEMENTS = 1 << 24
"""Logits of one chunk (64 MiB in fp32)."""


class HeadError(UserError):
    """A model whose logits are not what this head computes."""


class Head:
    """The output layer of a causal language model at a sampling temperature."""

    def __init__(self, model: Any, temperature: float, chunk_elements: int = CHUNK_ELEMENTS) -> None:
        self.layer: nn.Linear = model.get_output_embeddings()
        self.temperature = temperature
        self.chunk_elements = chunk_elements
        config = model.config.get_text_config()
        self.softcap: float | None = getattr(config, "final_logit_softcapping", None)
        self.scale = float(getattr(config, "logit_scale", None) or 1.0)
        self.scale /= float(getattr(config, "logits_scaling", None) or 1.0)

    def logits(self, hidden: Tensor) -> Tensor:
        """[M, H] -> [M, V] in fp32 (or float64), before the temperature."""
        z = self.layer(hidden) * self.scale
        z = z.float() if z.dtype in (torch.bfloat16, torch.float16) else z
        return z if self.softcap is None else self.softcap * torch.tanh(z / self.softcap)

    def __call__(self, hidden: Tensor, targets: Tensor, entropy: bool, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        """hidden [M, H], targets [M] -> (log-probs [M], entropies [M] in nats, zeros unless `entropy`)."""
        rows = max(1, self.chunk_elements // self.layer.out_features)
        chunks = list(zip(hidden.split(rows), targets.split(rows)))
        if len(chunks) <= 1 or not torch.is_grad_enabled():
            parts = [self._chunk(h, t, entropy, entropy_grad) for h, t in chunks]
        else:
            parts = [
                checkpoint(self._chunk, h, t, entropy, entropy_grad, use_reentrant=False, preserve_rng_state=False)
                for h, t in chunks
            ]
        if not parts:
            empty = hidden.sum(-1)
            return empty, empty
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _chunk(self, hidden: Tensor, targets: Tensor, entropy: bool, entropy_grad: bool) -> tuple[Tensor, Tensor]:
        z = self.logits(hidden) / self.temperature
        logp = torch.log_softmax(z, -1)
        picked = logp.gather(-1, targets[:, None])[:, 0]
        if not entropy:
            return picked, torch.zeros_like(picked)
        source = logp if entropy_grad else logp.detach()
        return picked, -(source.exp() * source).sum(-1)


def check_head(model: Any, head: Head) -> None:
    """Raises `HeadError` when the head's logits differ from the model's own on a few tokens."""
    vocab = head.layer.out_features
    ids = (torch.arange(8, device=head.layer.weight.device) * 7919 % vocab)[None]
    with torch.no_grad():
        theirs = model(input_ids=ids, use_cache=False).logits[0]
        ours = head.logits(model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0])
    gap = float((theirs.to(ours.dtype) - ours).abs().max())
    if gap > 1e-2 * max(1.0, float(ours.abs().max())):
        raise HeadError(
            f"{type(model).__name__} post-processes its logits in a way the learner does not know (largest difference "
            f"{gap:.3g}); teach it to retool/learner/head.py before training this model"
        )
