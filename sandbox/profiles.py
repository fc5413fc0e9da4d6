"""Profiles: which modules a warm interpreter has imported, and what it runs once so that caches are filled."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Profile:
    """`modules` must be importable; `warmup` is our own code, run once in the zygote. `without`: modules that the
    others would import if they were there, and that start threads: a warm interpreter must have one."""

    name: str
    modules: tuple[str, ...] = ()
    warmup: str = ""
    without: tuple[str, ...] = ()


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

_DATA = """
import scipy.integrate, scipy.linalg, scipy.optimize, scipy.special, scipy.stats, pandas
scipy.optimize.brentq(lambda x: x - 1, 0, 3); scipy.stats.norm.cdf(0.5); scipy.special.gamma(3.5)
repr(pandas.DataFrame({"a": [1, 2], "b": ["x", "y"]}).groupby("b").sum())
"""

PROFILES: dict[str, Profile] = {
    "py-bare": Profile("py-bare", (), _COMMON),
    "py-math": Profile("py-math", ("numpy", "mpmath", "sympy"), _COMMON + _MATH),
    "py-data": Profile(
        "py-data", ("numpy", "mpmath", "sympy", "scipy", "pandas"), _COMMON + _MATH + _DATA, ("pyarrow",)
    ),
}
"""Smallest first."""

AUTO = "auto"
"""Not a profile: take the smallest one that has what the code mentions."""


def available() -> tuple[str, ...]:
    """Profiles whose modules are installed in this environment."""
    return tuple(
        name
        for name, profile in PROFILES.items()
        if all(importlib.util.find_spec(module) is not None for module in profile.modules)
    )


_MENTIONS = {
    name: re.compile(r"\b(?:" + "|".join(profile.modules) + r")\b")
    for name, profile in PROFILES.items()
    if profile.modules
}


def choose(code: str, profiles: Sequence[str]) -> str:
    """The smallest of `profiles` (at least one) that has imported every module whose name stands in `code`.

    A name in a comment counts too: a warmer interpreter than needed costs a little, a colder one an import. Modules
    that no profile has are imported by the code itself.
    """
    known = [name for name in PROFILES if name in profiles]
    wanted = {word for name in known if name in _MENTIONS for word in _MENTIONS[name].findall(code)}
    return next((name for name in known if wanted <= set(PROFILES[name].modules)), known[-1])
