"""Potential-based shaping over the turns of a trajectory (Ng, Harada, Russell 1999; A §10.1).

Turn k = 1..T earns F_k = γ Φ(s_k) - Φ(s_{k-1}), s_k being the state after k turns. Φ of the last state is 0 whatever
the potential says, truncated episodes included; otherwise it would be a real reward. So Σ γ^(k-1) F_k = -Φ(s_0), the
same for all trajectories of a problem: the order of policies stays, and group baselines cancel it exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from retool.errors import UserError
from retool.records import Trajectory

Potential = Callable[[Trajectory, int], float]
"""(trajectory, number of turns done) -> Φ of that state; bounded, and looking at nothing that comes later."""


def last_call_ok(trajectory: Trajectory, turns: int) -> float:
    """1 when the latest call of the first `turns` turns ended well, else 0."""
    calls = [c for c in trajectory.tool_calls if c.turn < turns]
    return float(bool(calls) and calls[-1].ok)


def calls_ok(trajectory: Trajectory, turns: int) -> float:
    """Share of the calls so far that ended well; 0 without calls."""
    calls = [c for c in trajectory.tool_calls if c.turn < turns]
    return sum(c.ok for c in calls) / len(calls) if calls else 0.0


POTENTIALS: dict[str, Potential] = {"last_call_ok": last_call_ok, "calls_ok": calls_ok}


def shape(potentials: Sequence[float], gamma: float) -> list[float]:
    """[T] F_k of Φ(s_0) ... Φ(s_T) as given; `terminal` makes the last one 0."""
    return [gamma * after - before for before, after in pairwise(potentials)]


def terminal(potentials: Sequence[float]) -> list[float]:
    """The same potentials with 0 for the last state."""
    return [*potentials[:-1], 0.0]


def discounted(rewards: Sequence[float], gamma: float) -> float:
    """Σ γ^k r_k, k from 0."""
    return math.fsum(gamma**k * r for k, r in enumerate(rewards))


def turn_shaping(trajectory: Trajectory, turns: int, potential: Potential, gamma: float, name: str) -> list[float]:
    """[turns] what each turn earns. Raises `UserError` for a potential that is not a finite number."""
    values = [potential(trajectory, k) for k in range(turns)]
    if not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise UserError(f"reward.shaping.potential: {name!r} returned {values}; it must return finite numbers")
    shaped = shape([*values, 0.0], gamma)
    left = discounted(shaped, gamma) + values[0]
    if abs(left) > 1e-9 * max(1.0, *map(abs, values)):
        raise AssertionError(f"shaping does not telescope: {left} is left of {values}")
    return shaped
