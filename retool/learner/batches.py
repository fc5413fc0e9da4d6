"""From a rollout to mini-batches of whole atoms, and from those to micro-batches within a token budget."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise

from retool.learner.layout import Layout
from retool.objectives import Atom, Batch, Structure
from retool.objectives.keyed import key_of


def mini_batches(batch: Batch, structure: Structure, updates: int, seed: object) -> list[list[Atom]]:
    """At most `updates` mini-batches of near equal size, in an order keyed by `seed` and the trajectories.

    Groups stay whole where the structure has groups, so that `group_token_mean` means what it says. Fewer mini-batches
    come out when there are fewer groups (or atoms) than `updates`.
    """
    keys = batch["key"].tolist()
    groups = batch["group"].tolist() if structure.kind == "group" else None
    units: dict[object, list[Atom]] = {}
    for atom in structure.atoms(batch):
        units.setdefault(groups[atom.rows[0]] if groups is not None else atom, []).append(atom)
    ordered = sorted(units.values(), key=lambda unit: key_of(seed, min(keys[r] for a in unit for r in a.rows)))
    count = min(updates, len(ordered))
    bounds = [round(i * len(ordered) / count) for i in range(count + 1)] if count else [0]
    return [[atom for unit in ordered[a:b] for atom in unit] for a, b in pairwise(bounds)]


def micro_batches(
    atoms: Sequence[Atom], lengths: Sequence[int], layout: Layout, budget: int, most: int | None
) -> list[list[int]]:
    """Rows of each micro-batch: atoms of similar length together, at most `budget` tokens (padding counted) and `most`
    samples; a larger atom travels alone. `lengths`: input tokens of each row."""
    ordered = sorted(atoms, key=lambda a: (max(lengths[r] for r in a.rows), a.rows))
    out: list[list[int]] = []
    rows: list[int] = []
    tokens = 0
    for atom in ordered:
        wide = max(lengths[r] for r in atom.rows)
        n = len(rows) + len(atom.rows)
        cost = n * wide if layout == "padded" else tokens + sum(lengths[r] for r in atom.rows)
        if rows and (cost > budget or (most is not None and n > most)):
            out.append(rows)
            rows, tokens = [], 0
        rows.extend(atom.rows)
        tokens += sum(lengths[r] for r in atom.rows)
    if rows:
        out.append(rows)
    return out


def passes(n: int, step: int, size: int, key: str) -> list[tuple[int, int]]:
    """(pass, index) of step `step`'s `size` rows of `n`: passes over all of them, each in an order keyed by `key`."""
    out: list[tuple[int, int]] = []
    orders: dict[int, list[int]] = {}
    for i in range(step * size, (step + 1) * size):
        epoch, at = divmod(i, n)
        if epoch not in orders:
            orders[epoch] = list(range(n))
            random.Random(f"{key}/{epoch}").shuffle(orders[epoch])
        out.append((epoch, orders[epoch][at]))
    return out
