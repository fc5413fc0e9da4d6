"""What must never pass silently: trained tokens that were not sampled, numbers that are not finite.

Both stop the run and leave a bundle on disk with everything needed to see what happened.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from retool.learner.collate import Rollout, SpanCheck
from retool.transcript import digest_tokens


class LearnerStopped(RuntimeError):
    """The learner refuses to go on; `bundle` is the folder with the evidence."""

    def __init__(self, reason: str, bundle: Path) -> None:
        super().__init__(f"{reason}. The batch is in {bundle} (batch.safetensors, info.json)")
        self.bundle = bundle


def write_bundle(folder: Path, rollout: Rollout, reason: str, info: dict[str, Any]) -> Path:
    """Columns and ids as safetensors, the rest as JSON. Never overwrites an earlier bundle."""
    target, n = folder, 1
    while target.exists():
        n += 1
        target = folder.with_name(f"{folder.name}-{n}")
    target.mkdir(parents=True)
    tensors = {f"token/{k}": v.contiguous() for k, v in rollout.batch.tokens.items()}
    tensors |= {f"sample/{k}": v.contiguous() for k, v in rollout.batch.samples.items()}
    tensors["offsets"] = rollout.batch.offsets.contiguous()
    if rollout.rows:
        tensors["ids"] = torch.from_numpy(np.concatenate(rollout.rows))
    tensors["ids_lengths"] = torch.tensor([len(r) for r in rollout.rows], dtype=torch.int64)
    tensors["starts"] = torch.tensor(rollout.starts, dtype=torch.int64)
    save_file({k: v.clone() for k, v in tensors.items()}, target / "batch.safetensors")
    data = {"reason": reason, "samples": rollout.ids, **info}
    (target / "info.json").write_text(json.dumps(data, indent=1, default=str), encoding="utf-8")
    return target


def compare_digests(
    targets: Tensor, logp_rollout: Tensor, offsets: Tensor, checks: list[list[SpanCheck]]
) -> tuple[int, list[tuple[int, int]]]:
    """(number of sampled spans, [(row, turn) of those that differ]) of one micro-batch.

    `targets` [n]: ids read from the input tensor of the model; `logp_rollout` [n]: the column the loss reads. A span
    that the sample holds only in part is completed from the transcript. A span without a digest differs.
    """
    ids = targets.cpu().numpy()
    logps = logp_rollout.cpu().numpy()
    count, bad = 0, []
    for row, (begin, spans) in enumerate(zip(offsets.tolist(), checks)):
        for check in spans:
            here = slice(begin + check.start, begin + check.start + check.length)
            trained, logp = ids[here], logps[here]
            if check.length != len(check.span):
                there = slice(check.offset, check.offset + check.length)
                whole_ids = np.asarray(check.span.ids, dtype=np.int64)
                whole_logp = np.asarray(check.span.logprobs, dtype=np.float64)
                whole_ids[there], whole_logp[there] = trained, logp
                trained, logp = whole_ids, whole_logp
            count += 1
            if digest_tokens(trained, logp) != check.span.digest:  # type: ignore[arg-type]
                bad.append((row, check.span.turn))
    return count, bad


def not_finite(values: dict[str, float]) -> list[str]:
    """Names of the values that are not finite."""
    return [name for name, value in values.items() if not math.isfinite(value)]
