"""Profiles: which modules a warm interpreter has imported, and what it runs once so that caches are filled."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """`modules` must be importable; `warmup` is our own code, run once in the zygote."""

    name: str
    modules: tuple[str, ...] = ()
    warmup: str = ""


_COMMON = (
    "import math, random, re, itertools, collections, functools, fractions, decimal, statistics, string, heapq, "
    "bisect, operator, json, datetime, typing, dataclasses, copy, time\n"
)
_MATH = """
import numpy, sympy
numpy.linalg.solve(numpy.eye(3), numpy.ones(3)); numpy.random.rand(2); repr(numpy.arange(3.0))
_x = sympy.symbols("x")
sympy.solve(_x**2 - 2, _x); sympy.simplify(_x * (_x + 1) - _x); str(sympy.factor(_x**2 - 1)); sympy.sympify("x+1")
sympy.diff(sympy.sin(_x), _x); sympy.integrate(_x, _x); sympy.nsimplify(0.5); sympy.factorint(60); sympy.N(sympy.pi)
"""

PROFILES: dict[str, Profile] = {
    "py-bare": Profile("py-bare", (), _COMMON),
    "py-math": Profile("py-math", ("numpy", "mpmath", "sympy"), _COMMON + _MATH),
}
