"""The passes of the embedded engine over its slots: prefill, decode, and the check that a model can be run so.

Runs in the engine's worker thread. A row's last token is never prefilled: it is fed by the decode pass, together with
everybody else's, so a prefill needs no logits and an observation costs exactly its own tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from retool.engines.base import EngineError
from retool.engines.rows import Row
from retool.engines.slot_cache import SlotCache

ROUND = 16  # attention sees columns up to a multiple of this
PREFILL_TOKENS = 8192  # padded tokens in one prefill pass
UNSUPPORTED_ROPE = ("dynamic", "longrope")


class ModelNotSupported(EngineError):
    """This model cannot be run over slots; the message says why and what to do. Not retryable."""

    retryable = False


class Forward:
    """A causal LM over a `SlotCache`."""

    def __init__(self, model: Any, slots: int, context: int) -> None:
        self.model = model
        self.context = context
        self.device: torch.device = model.device
        self.cache = SlotCache(slots)
        self.passes = 0
        _refuse(model.config, context)

    @torch.no_grad()
    def prefill(self, rows: Sequence[Row]) -> None:
        """Feed all but the last token of each row; rows of similar length share a padded pass."""
        todo = sorted((r for r in rows if len(r.ids) - 1 > r.cached), key=lambda r: (r.cached + 1 - len(r.ids), r.key))
        while todo:
            width = min(len(todo[0].ids) - 1 - todo[0].cached, PREFILL_TOKENS)
            batch: list[Row] = []
            for row in todo:
                count = len(row.ids) - 1 - row.cached
                if (len(batch) + 1) * width > PREFILL_TOKENS or 2 * count < width:
                    break
                batch.append(row)
            batch = batch or todo[:1]
            self._prefill_batch(batch, width)
            todo = [r for r in todo if len(r.ids) - 1 > r.cached]

    def _prefill_batch(self, rows: Sequence[Row], width: int) -> None:
        chunks = [r.ids[r.cached : min(len(r.ids) - 1, r.cached + width)] for r in rows]
        starts = [r.cached for r in rows]
        end = max(starts) + width
        self.cache.reserve(end + 1)
        # padding stands behind the chunk, where later tokens will overwrite it
        tokens = torch.tensor([c + [0] * (width - len(c)) for c in chunks], device=self.device)
        positions = torch.tensor(starts, device=self.device)[:, None] + torch.arange(width, device=self.device)
        index = torch.tensor([r.slot for r in rows], device=self.device)
        used = self._used(end)
        self.cache.select(index, len(rows), positions, used)
        self._run(tokens, positions, used)
        for row, chunk in zip(rows, chunks):
            row.cached += len(chunk)
            row.fed = max(row.fed, row.cached)

    @torch.no_grad()
    def decode(self, rows: Sequence[Row], slots: Sequence[Row | None]) -> torch.Tensor:
        """Feed the last token of each row; [A, V] logits of the next one."""
        numbers = [r.slot for r in rows]
        top = max(r.cached for r in rows) + 1
        count = max(n for n in numbers if n is not None) + 1
        idle = [r.cached if r is not None else 0 for r in slots[:count]]
        self.cache.reserve(top + 1)  # one more than needed: where an idle slot's dummy goes next time
        used = self._used(top)
        if 2 * len(rows) > count:  # idle slots among them are fed a dummy, and nothing is copied
            column, feed = idle, [0] * count
            for row, slot in zip(rows, numbers):
                feed[slot] = row.ids[-1]  # type: ignore[index]
            select = None
        else:
            column, feed = [r.cached for r in rows], [r.ids[-1] for r in rows]
            select, count = torch.tensor(numbers, device=self.device), len(rows)
        positions = torch.tensor(column, device=self.device)[:, None]
        self.cache.select(select, count, positions, used)
        logits = self._run(torch.tensor(feed, device=self.device)[:, None], positions, used)[:, -1]
        for row in rows:
            row.cached += 1
            row.fed = max(row.fed, row.cached)
        if select is None and numbers != list(range(count)):  # logits come in the order of slots
            logits = logits[torch.tensor(numbers, device=self.device)]
        return logits

    def _used(self, columns: int) -> int:
        return min(-(-columns // ROUND) * ROUND, self.cache.capacity)

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor, used: int) -> torch.Tensor:
        visible = torch.arange(used, device=self.device) <= positions[:, None, :, None]
        dtype = self.model.dtype
        mask = torch.zeros(visible.shape, dtype=dtype, device=self.device)
        mask.masked_fill_(~visible, torch.finfo(dtype).min)  # additive: made once here, not once a layer
        self.passes += 1
        # an idle slot may stand one column behind the last position that the model knows
        out = self.model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions.clamp(max=self.context - 1),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = out.logits
        return logits


def _refuse(config: Any, context: int) -> None:
    """Model features that break the assumption `key j is visible to position p iff j <= p, at its own rotation`."""
    name = f"{type(config).__name__} ({getattr(config, 'name_or_path', '') or 'in memory'})"
    attention = config._attn_implementation
    if attention not in ("sdpa", "eager"):
        raise ModelNotSupported(
            f"{name}: attention {attention!r} takes no explicit mask; load it with attn_implementation='sdpa'"
        )
    window = getattr(config, "sliding_window", None)
    layers = getattr(config, "layer_types", None) or ["full_attention"]
    odd = sorted({t for t in layers if t not in ("full_attention", "sliding_attention")})
    if odd:
        raise ModelNotSupported(f"{name}: layers of type {', '.join(odd)} keep no per-token cache; use another engine")
    slides = "sliding_attention" in layers or (window and getattr(config, "layer_types", None) is None)
    if slides and window and getattr(config, "use_sliding_window", True) and context > window:
        raise ModelNotSupported(
            f"{name}: its attention slides over {window} tokens; set engine.context to at most {window}"
        )
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    kind = rope.get("rope_type", "default") if isinstance(rope, dict) else "default"
    if kind in UNSUPPORTED_ROPE:
        raise ModelNotSupported(f"{name}: rope type {kind!r} rotates by the longest row of a batch; use another engine")


@torch.no_grad()
def probe(forward: Forward) -> None:
    """Run two rows of unequal age over slots and compare with plain passes; raises `ModelNotSupported`.

    Tolerance: 1e-3 in float32, 0.25 in shorter types (of logits scaled to their own spread).
    """
    from retool.engines.text import Tail  # rows need one; none of its methods is called here

    vocab = forward.model.config.get_text_config().vocab_size
    texts = [[(7 * i + 3) % vocab for i in range(9)], [(5 * i + 1) % vocab for i in range(4)]]
    saved, forward.cache = forward.cache, SlotCache(2)
    try:
        rows = [Row(0, (i,), t, bytearray(len(t)), Tail.__new__(Tail), slot=i) for i, t in enumerate(texts)]
        forward.prefill(rows)
        got = forward.decode(rows, rows).float()
        plain = [
            forward.model(input_ids=torch.tensor([t], device=forward.device), use_cache=False).logits[0, -1].float()
            for t in texts
        ]
    except (TypeError, AttributeError, RuntimeError, NotImplementedError, IndexError) as error:
        raise ModelNotSupported(
            f"{type(forward.model).__name__} does not run over the slot cache ({error}); use another engine"
        ) from error
    finally:
        forward.cache = saved
    want = torch.stack(plain)
    gap = float(((got - want).abs().amax(-1) / want.std(-1).clamp(min=1.0)).max())
    limit = 1e-3 if forward.model.dtype == torch.float32 else 0.25
    if not gap <= limit:
        raise ModelNotSupported(
            f"{type(forward.model).__name__} gives other logits over the slot cache (gap {gap:.3g} > {limit}); "
            "its attention or its cache is not the ordinary one: use another engine"
        )
