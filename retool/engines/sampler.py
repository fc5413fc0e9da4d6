"""From logits to one token a row, with randomness keyed by (seed, number of tokens), never by place in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MASK64 = (1 << 64) - 1


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def mix_seed(*parts: int) -> int:
    """One 63-bit seed out of several integers; every part matters and so does their order."""
    state = np.zeros(1, dtype=np.uint64)
    for part in parts:
        state = _mix((state + _GOLDEN) ^ _mix(np.array([part & _MASK64], dtype=np.uint64) + _GOLDEN))
    return int(state[0]) >> 1


def uniforms(seeds: Sequence[int], counts: Sequence[int], attempt: int = 0) -> npt.NDArray[np.float64]:
    """[A] numbers in [0, 1): a pure function of each row's seed, its token count and the attempt."""
    state = _mix(np.array([s & _MASK64 for s in seeds], dtype=np.uint64) + _GOLDEN)
    state = _mix((state + _GOLDEN) ^ _mix(np.asarray(counts, dtype=np.uint64) + _GOLDEN))
    state = _mix(state + np.uint64((attempt * int(_GOLDEN)) & _MASK64))
    return (state >> np.uint64(11)).astype(np.float64) * 2.0**-53


def probe_temperatures(
    logits: torch.Tensor, fork: torch.Tensor, rest: torch.Tensor, threshold: torch.Tensor, code: torch.Tensor
) -> torch.Tensor:
    """[A] temperatures of the next token, by the entropy of its distribution at temperature 1: `fork` above
    `threshold` (nats), `rest` elsewhere. Rows in `code` (bool) take forks at 1 at most. logits [A, V], the rest [A]."""
    logp = torch.log_softmax(logits.float(), dim=-1)
    entropy = -(logp.exp() * logp.clamp(min=torch.finfo(logp.dtype).min)).sum(-1)
    high = torch.where(code, fork.clamp(max=1.0), fork)
    return torch.where(entropy > threshold, high, rest)


def processed_logprobs(
    logits: torch.Tensor, temperature: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float]
) -> torch.Tensor:
    """[A, V] log-probs of the distribution that is sampled from: temperature, then top-k, then top-p, renormalised.

    A row with temperature 0 is reported under temperature 1 (the token itself is the most likely one).
    """
    scaled = logits.float() / torch.where(temperature > 0, temperature, torch.ones_like(temperature))[:, None]
    rows = [i for i, (k, p) in enumerate(zip(top_k, top_p)) if 0 < k < scaled.shape[1] or p < 1.0]
    if rows:
        index = torch.tensor(rows, device=scaled.device)
        keep = [top_k[i] or scaled.shape[1] for i in rows]
        scaled[index] = _truncate(scaled[index], keep, [top_p[i] for i in rows])
    return torch.log_softmax(scaled, dim=-1)


def _truncate(scaled: torch.Tensor, top_k: Sequence[int], top_p: Sequence[float]) -> torch.Tensor:
    """Minus infinity for all but the k best, then for all but the smallest set that holds probability p."""
    ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scaled.shape[1], device=scaled.device)
    drop = rank[None] >= torch.tensor(top_k, device=scaled.device)[:, None]
    probs = torch.softmax(ordered.masked_fill(drop, -torch.inf), dim=-1)
    drop |= probs.cumsum(-1) - probs >= torch.tensor(top_p, device=scaled.device, dtype=probs.dtype)[:, None]
    drop[:, 0] = False
    return torch.full_like(scaled, -torch.inf).scatter(-1, order, ordered.masked_fill(drop, -torch.inf))


def draw(logp: torch.Tensor, u: npt.NDArray[np.float64], greedy: Sequence[bool]) -> tuple[list[int], list[float]]:
    """One token a row and its log-prob, by inversion of the cumulated distribution. `logp`: [A, V], `u`: [A]."""
    cdf = logp.double().exp().cumsum(-1)
    point = torch.as_tensor(u, device=logp.device)[:, None] * cdf[:, -1:]
    token = torch.searchsorted(cdf, point, right=True).clamp_(max=logp.shape[1] - 1)
    if any(greedy):
        best = logp.argmax(-1, keepdim=True)
        token = torch.where(torch.tensor(greedy, device=logp.device)[:, None], best, token)
    value = logp.gather(-1, token)
    bad = torch.isneginf(value)
    if bool(bad.any()):  # rounding put the point behind the last possible token
        token = torch.where(bad, logp.argmax(-1, keepdim=True), token)
        value = logp.gather(-1, token)
    return token[:, 0].tolist(), value[:, 0].tolist()
