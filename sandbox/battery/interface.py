"""Attacks on the interface: requests that are malformed, paths that lead outside, state that is abandoned."""

from __future__ import annotations

from sandbox.battery.attack import Attack

ATTACKS: tuple[Attack, ...] = ()
