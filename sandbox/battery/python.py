"""Attacks on the interpreter that we share with the program: source it cannot parse, objects that misbehave, broken
streams, hooks. The status must stay true and the next run must not notice."""

from __future__ import annotations

from dataclasses import replace

from sandbox.battery.attack import LIMITS, Attack, Control

_OWN_HARM = "hurts only its own interpreter; what is checked is the outcome and the next run"
_SHORT = replace(LIMITS, wall_s=1.5, cpu_s=2)
_BAD_EXCEPTION = """
class Meta(type):
    @property
    def __name__(cls): raise SystemExit(0)
    def __getattribute__(cls, name):
        if name == "__qualname__": raise KeyboardInterrupt
        return super().__getattribute__(name)
class Bad(Exception, metaclass=Meta):
    def __str__(self): raise Bad()
    __repr__ = __str__
    @property
    def __cause__(self): raise Bad()
raise Bad()
"""
_CHAIN = """
error = None
for index in range(20_000):
    new = ValueError(index)
    new.__context__ = error
    error = new
raise error
"""
_GROUPS = """
error = ValueError("x")
for _ in range(20_000):
    error = ExceptionGroup("g", [error])
raise error
"""
_LOOP = """
first, second = ValueError("first"), ValueError("second")
first.__cause__, second.__cause__ = second, first
raise first
"""
_SPIN_IN_STR = """
class Slow(Exception):
    def __str__(self):
        while True: pass
raise Slow()
"""
_SHOW = """
class Shown:
    def __repr__(self):
        return repr(self)
Shown()
"""
_HOOKS = """
import builtins, gc, json, sys, threading
class Nothing:
    def write(self, text): raise MemoryError
    def flush(self): raise MemoryError
    def __getattr__(self, name): raise MemoryError
def trace(*args):
    raise RuntimeError("trace")
sys.addaudithook(lambda *args: None)
gc.callbacks.append(lambda *args: 1 / 0)
sys.excepthook = sys.unraisablehook = sys.displayhook = threading.excepthook = None
json.dumps = json.loads = None
sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = Nothing()
for name in ("print", "repr", "len", "open", "isinstance", "BaseException", "str", "compile"):
    setattr(builtins, name, None)
sys.settrace(trace)
"""
_MODULES = """
import sys, gc
for name in list(sys.modules):
    sys.modules[name] = None
for found in gc.get_objects():
    if type(found) is dict and "run_source" in found:
        found.clear()
"""
_AUDIT = """
import sys
def hook(event, args):
    raise RuntimeError(event)
sys.addaudithook(hook)
open("x")
"""
_FRAMES = """
import gc, sys
# Reach for the runner's own frames and variables: they belong to this process only, and hold nothing of others.
frame = sys._getframe()
while frame:
    for value in list(frame.f_locals.values()):
        if isinstance(value, dict) and value is not globals():
            value.clear()
    frame = frame.f_back
1 / 0
"""
_FINALISER = """
class Late:
    def __del__(self):
        while True: pass
import sys
sys.late = Late()
keep = Late()
del keep
"""
_FAULT = """
import faulthandler, sys
faulthandler.enable(file=sys.stderr, all_threads=True)
faulthandler.dump_traceback_later(0.1, repeat=True, exit=True)
import time
time.sleep(60)
"""
_BYTECODE = """
def f(): pass
f.__code__ = f.__code__.replace(co_code=bytes([100, 250] * 2000), co_stacksize=0)
f()
"""
_LAST_VALUE = """
print("x")
type("X", (), {"__repr__": lambda self: "\\x00\\ud800" * 1000})()
"""


def _self(
    name: str,
    origin: str,
    code: str,
    *expect: str,
    says: str = "",
    control: Control = Control.NONE,
    short: bool = False,
) -> Attack:
    """A program that breaks its own interpreter."""
    return Attack(
        name,
        origin,
        code,
        expect,
        says=says,
        control=control,
        why="" if control is not Control.NONE else _OWN_HARM,
        limits=_SHORT if short else LIMITS,
        plain=True,
    )


ATTACKS = (
    _self("read address zero", "#54", "import ctypes; ctypes.string_at(0)", "signal", control=Control.KILLS),
    _self("abort", "#54", "import os; os.abort()", "signal", control=Control.KILLS),
    _self("leave at once", "#56", "import os; os._exit(7)", "exit", control=Control.KILLS),
    _self("exit with words", "#56", "import sys; sys.exit('words')", "exit"),
    _self("exit with a huge number", "#56", "raise SystemExit(2**40)", "exit"),
    _self("exit in a thread", "own", "import threading, sys\nthreading.Thread(target=sys.exit).start()", "ok"),
    _self(
        "endless recursion",
        "#58",
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): f()\nf()",
        *("error", "cpu_limit", "timeout", "signal", "memory_limit"),
        short=True,
    ),
    _self(
        "recursion in C", "own", "x = []\nfor _ in range(200_000): x = [x]\nrepr(x)", "error", "signal", "memory_limit"
    ),
    _self("5000 parentheses", "#59", "(" * 5000 + ")" * 5000, "error", "memory_limit"),
    _self("two million minus signs", "#59", "-" * 900_000 + "1", "error", "memory_limit", "signal", "cpu_limit"),
    _self("one line of a megabyte", "#59", "x = '" + "a" * 1_000_000 + "'", "ok"),
    _self("code of two megabytes", "#59", "#" * 2_000_000, "rejected"),
    _self("a NUL in the source", "#60", "x = 1\0", "error"),
    _self("half a surrogate pair", "#60", "x = '\ud800'", "rejected"),
    _self("a foreign coding line", "#60", "# -*- coding: utf-7 -*-\nprint('ok')", "ok", "error"),
    _self("a byte order mark", "#60", "\ufeffprint('ok')", "ok", "error"),
    _self("a very long number", "#62", "str(10**100000)", "error"),
    _self("an exception that cannot be shown", "own", _BAD_EXCEPTION, "error", "exit"),
    _self("20000 chained exceptions", "own", _CHAIN, "error", "exit", "signal", "memory_limit"),
    _self("20000 nested groups", "own", _GROUPS, "error", "exit", "signal", "memory_limit"),
    _self("causes in a circle", "own", _LOOP, "error"),
    _self("an exception of 50 MB", "own", "raise ValueError('x' * 50_000_000)", "error"),
    _self(
        "a message that never comes", "own", _SPIN_IN_STR, "timeout", "cpu_limit", control=Control.OUTLIVES, short=True
    ),
    _self("a repr that shows itself", "own", _SHOW, "error", "signal"),
    _self("surrogates and NUL as output", "own", _LAST_VALUE, "ok"),
    _self(
        "bytes that are not text", "own", "import os; os.write(1, bytes(range(256)) * 10); os.write(2, b'\\xff')", "ok"
    ),
    _self("hooks and builtins replaced", "own", _HOOKS, "ok", "error", "exit", "memory_limit"),
    _self("modules taken away", "own", _MODULES, "ok", "error", "exit", "signal"),
    _self("an audit hook that refuses", "own", _AUDIT, "error", "exit"),
    _self("the runner's frames emptied", "own", _FRAMES, "error", "exit", "signal"),
    _self(
        "a finaliser that never ends", "own", _FINALISER, "timeout", "cpu_limit", control=Control.OUTLIVES, short=True
    ),
    _self("fault handler's clock", "own", _FAULT, "exit", control=Control.KILLS),
    _self("bytecode that is none", "own", _BYTECODE, "signal", "error", "exit", "timeout", "cpu_limit", short=True),
    _self(
        "standard streams closed", "own", "import sys, os\nsys.stdout.close(); sys.stderr.close(); os.close(0)", "ok"
    ),
    _self(
        "the loader poisoned",
        "own",
        "import sys\nsys.meta_path.clear(); sys.path[:] = ['/nonexistent']\nimport wave",
        "error",
    ),
)
