"""Procedural problem families. To add one, write a function `make(rng) -> Item` and decorate it with `register`.

The three of the demo suit a very small model with one token a character: prompts are short, and the code that solves
one is mostly copied from the prompt. `product` and `power_mod` need the interpreter; `larger` does not.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One problem with the programmatic teacher's material: `code` prints the answer, `steps` reason without it."""

    prompt: str
    answer: str
    code: str
    steps: tuple[str, ...] = ()


@dataclass(frozen=True)
class Family:
    """`needs_tool` says what its author expects, for reports and tests; nothing is decided by it."""

    name: str
    summary: str
    needs_tool: bool
    make: Callable[[random.Random], Item]


FAMILIES: dict[str, Family] = {}


def register(name: str, summary: str, needs_tool: bool) -> Callable[[Callable[[random.Random], Item]], Family]:
    """Decorator that makes a family known to recipes. Raises `ValueError` when the name is taken."""

    if name in FAMILIES:
        raise ValueError(f"problem family {name!r} exists already; choose another name")

    def add(make: Callable[[random.Random], Item]) -> Family:
        FAMILIES[name] = Family(name, summary, needs_tool, make)
        return FAMILIES[name]

    return add


@register("product", "product of two 4-digit numbers", needs_tool=True)
def product(rng: random.Random) -> Item:
    a, b = rng.randint(3163, 9999), rng.randint(3163, 9999)  # the product has eight digits
    return Item(f"What is {a}*{b}?", str(a * b), f"print({a}*{b})")


@register("power_mod", "remainder of a power, in Python's notation", needs_tool=True)
def power_mod(rng: random.Random) -> Item:
    base, exponent, modulus = (rng.randint(11, 99) for _ in range(3))
    expression = f"{base}**{exponent}%{modulus}"
    return Item(f"Find {expression}?", str(pow(base, exponent, modulus)), f"print({expression})")


@register("larger", "the larger of two 2-digit numbers", needs_tool=False)
def larger(rng: random.Random) -> Item:
    a, b = rng.sample(range(10, 100), 2)
    return Item(f"Larger of {a},{b}?", str(max(a, b)), f"print(max({a},{b}))")


@register("last", "the last of three 2-digit numbers", needs_tool=False)
def last(rng: random.Random) -> Item:
    a, b, c = (rng.randint(10, 99) for _ in range(3))
    return Item(f"Last of {a}, {b}, {c}?", str(c), f"print([{a},{b},{c}][-1])")
