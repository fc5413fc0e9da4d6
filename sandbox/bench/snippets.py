"""Ten programs of the kind that models write to solve mathematics problems, and what each costs without a sandbox."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from sandbox.profiles import PROFILES
from sandbox.supervisor.settings import CLEAN_ENVIRONMENT

SNIPPETS: dict[str, str] = {
    "quadratic": """
import sympy as sp
x = sp.symbols('x')
print(sp.solve(x**2 - 5*x + 6, x))
""",
    "integral": """
from sympy import *
x = symbols('x')
print(integrate(x**2 * sin(x), (x, 0, pi)))
""",
    "simplify": """
import sympy as sp
x = sp.symbols('x')
print(sp.simplify((sp.sin(x)**2 + sp.cos(x)**2) * (x + 1)**2))
""",
    "factor": """
from sympy import factorint, primerange
print(factorint(2**61 + 3), sum(primerange(2, 5000)))
""",
    "system": """
import sympy as sp
a, b, c = sp.symbols('a b c')
system = [a + b + c - 6, a - b + 2*c - 5, 3*a + b - c - 2]
print(sp.linsolve(system, a, b, c))
""",
    "eigenvalues": """
import numpy as np
m = np.arange(1, 26.0).reshape(5, 5)
print(np.round(np.linalg.eigvals(m + m.T), 6))
""",
    "regression": """
import numpy as np
rng = np.random.default_rng(0)
x = rng.normal(size=(2000, 5))
y = x @ np.arange(5) + 1
print(np.round(np.linalg.lstsq(np.c_[x, np.ones(2000)], y, rcond=None)[0], 6))
""",
    "sieve": """
import numpy as np
n = 200000
sieve = np.ones(n, dtype=bool)
sieve[:2] = False
for i in range(2, int(n**0.5) + 1):
    if sieve[i]:
        sieve[i*i::i] = False
print(sieve.sum())
""",
    "monte carlo": """
import numpy as np
np.random.seed(1)
p = np.random.rand(100000, 2)
print(4 * ((p**2).sum(1) < 1).mean())
""",
    "recurrence": """
from sympy import *
n = symbols('n')
f = Function('f')
equation = f(n) - f(n - 1) - f(n - 2)
print(rsolve(equation, f(n), {f(0): 0, f(1): 1}))
""",
}

_INSIDE = r"""
import json, os, sys, time, importlib, gc
told = json.load(sys.stdin)
for name in told["modules"]:
    importlib.import_module(name)
exec(told["warmup"], {"__name__": "warmup"})
gc.collect(); gc.freeze(); gc.disable()
times = {}
null = os.open("/dev/null", os.O_WRONLY)
out = os.dup(1)
os.dup2(null, 1)
for name, code in told["snippets"].items():
    rows = times[name] = []
    for _ in range(told["repeats"]):
        read, write = os.pipe()
        pid = os.fork()
        if pid == 0:
            gc.enable()
            before = time.perf_counter()
            exec(compile(code, name, "exec"), {"__name__": "__main__"})
            os.write(write, repr(1e3 * (time.perf_counter() - before)).encode())
            os._exit(0)
        os.waitpid(pid, 0)
        rows.append(float(os.read(read, 64)))
        os.close(read); os.close(write)
os.write(out, json.dumps(times).encode())
"""


def in_process(repeats: int = 15, profile: str = "py-math") -> dict[str, list[float]]:
    """Milliseconds that each snippet computes in a warm interpreter, in a fresh copy each time, without a sandbox."""
    warm = PROFILES[profile]
    told = {"modules": warm.modules, "warmup": warm.warmup, "snippets": SNIPPETS, "repeats": repeats}
    done = subprocess.run(
        [sys.executable, "-P", "-c", _INSIDE],
        input=json.dumps(told),
        env=CLEAN_ENVIRONMENT,
        cwd=Path("/"),
        capture_output=True,
        text=True,
        check=True,
    )
    times: dict[str, list[float]] = json.loads(done.stdout)
    return times
