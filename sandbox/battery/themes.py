"""All attacks, by theme."""

from __future__ import annotations

from dataclasses import replace

from sandbox.battery import blame, files, interface, kernel, neighbours, network, processes, python, resources
from sandbox.battery.attack import Attack

_THEMES = (resources, files, network, processes, blame, kernel, python, neighbours, interface)

ATTACKS: tuple[Attack, ...] = tuple(
    replace(attack, theme=module.__name__.rpartition(".")[2]) for module in _THEMES for attack in module.ATTACKS
)


def select(only: str = "") -> tuple[Attack, ...]:
    """The attacks whose name, theme or number holds `only`; all when it is empty. Raises `ValueError` for none."""
    wanted = only.lower().strip()
    chosen = tuple(a for a in ATTACKS if wanted in a.name.lower() or wanted in (a.theme, *a.origin.split()))
    if not chosen:
        raise ValueError(f"no attack is called {only!r}: names, themes and numbers are in the table without --only")
    return chosen
