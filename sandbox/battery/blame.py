"""Attacks on the question whose fault it was: ends that should look like ours, and reports that lie.

A SIGKILL nobody here sent means that the machine failed, so a program must not be able to send itself one.
"""

# ruff: noqa: E501 (programs)
from __future__ import annotations

from sandbox.battery.attack import LIMITS, Attack, Control

_KILLS = """
def group():
    if told["unconfined"]:
        os.setpgid(0, 0)
    os.kill(0, 9)
def negative():
    if told["unconfined"]:
        os.setpgid(0, 0)
    os.kill(-os.getpgrp(), 9)
fatal("kill", lambda: os.kill(os.getpid(), 9))
fatal("kill the group", group)
fatal("kill the group by number", negative)
fatal("raise", lambda: signal.raise_signal(9))
fatal("pthread_kill", lambda: signal.pthread_kill(threading.get_ident(), 9))
fatal("pidfd", lambda: signal.pidfd_send_signal(os.pidfd_open(os.getpid()), 9))
fatal("tkill", lambda: call("tkill", threading.get_native_id(), 9))
info = (ctypes.c_int * 32)(9, 0, -1)
fatal("rt_sigqueueinfo", lambda: call("rt_sigqueueinfo", os.getpid(), 9, info))
"""
_THREAD_ID = """
def from_a_thread():
    ids = []
    thread = threading.Thread(target=lambda: (ids.append(threading.get_native_id()), time.sleep(1)), daemon=True)
    thread.start()
    while not ids:
        time.sleep(0.001)
    os.kill(ids[0], 9)
fatal("kill by a thread's id", from_a_thread)
os._exit(0)
"""
_CHILD_KILLS = """
def by_child(send):
    pid = os.fork()
    if pid == 0:
        try:
            send(os.getppid())
        finally:
            os._exit(0)
    os.waitpid(pid, 0)
    raise PermissionError(1, "still alive")
fatal("a child kills it", lambda: by_child(lambda parent: os.kill(parent, 9)))
fatal("the shell kills it", lambda: by_child(lambda parent: subprocess.run(["/bin/sh", "-c", f"kill -9 {parent}"])))
def by_group(parent):
    os.kill(-os.getpgid(parent), 9)
if not told["unconfined"]:
    fatal("a child kills its group", lambda: by_child(by_group))
"""
_TIMERS = """
def timer():
    event = (ctypes.c_int * 16)(0, 0, 9, 0)
    ident = ctypes.c_int()
    call("timer_create", 1, event, ctypes.byref(ident))
    raise OSError(errno.EPERM, "made") if told["unconfined"] else RuntimeError("made")
def lower_cpu():
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
    while True:
        pass
fatal("lower the CPU limit", lower_cpu)
def lower_other():
    resource.prlimit(0, resource.RLIMIT_CPU, (1, 1))
    signal.signal(signal.SIGXCPU, signal.SIG_IGN)
    while True:
        pass
fatal("lower the CPU limit by prlimit", lower_other)
attempt("ask for SIGKILL at the parent's death", lambda: checked(libc.prctl(1, 9, 0, 0, 0)))
attempt("ask for SIGKILL as the input signal", lambda: fcntl.fcntl(0, 10, 9))
def strict():
    checked(libc.prctl(22, 1, 0, 0, 0))
    os.getpid()
    os.getppid()
fatal("strict filter mode", strict)
"""
_LAST_WORD = """
# A child may be made to announce its end with any signal.
def by_a_childs_end():
    if call("clone", 9, 0, 0, 0, 0) == 0:
        os._exit(0)
    time.sleep(0.5)
fatal("a child whose end is a SIGKILL", by_a_childs_end)
"""
_FORGE = """
import json, os, sys
for fd in range(3, 1100):
    try:
        os.write(fd, json.dumps({"type": "MemoryError", "message": "forged", "traceback": "forged"}).encode())
    except OSError:
        pass
print('{"status": "ok", "reward": 1}')
os._exit(3)
"""
_FORGE_OK = """
import json, os
for fd in range(3, 1100):
    try:
        os.write(fd, json.dumps({"status": "ok", "type": 1, "message": None}).encode())
    except OSError:
        pass
raise ValueError("real")
"""
_GARBAGE = """
import os
for fd in range(3, 1100):
    try:
        for junk in (b"\\x00\\xff" * 100, b"[" * 200_000, b'{"type": 1e999, "message": "' + b"\\\\ud800" * 100 + b'"}', b"R", b"F"):
            os.write(fd, junk)
    except OSError:
        pass
os._exit(1)
"""
_FLOOD = """
import os, threading
def flood(fd):
    try:
        while True:
            os.write(fd, b"x" * 65536)
    except OSError:
        pass
for fd in range(3, 1100):
    flood(fd)
print("done")
"""
_CLOSE = """
import os
os.closerange(0, 4096)
"""
_SWAP = """
import os
left, right = os.pipe()
for fd in range(3, 1100):
    try:
        os.fstat(fd)
    except OSError:
        continue
    if fd not in (left, right):
        os.dup2(left, fd)
raise ValueError("unsaid")
"""
_NONE = "there is no report to forge without the sandbox"

ATTACKS = (
    Attack("kill oneself", "own", _KILLS),
    Attack("kill oneself by a thread's id", "own", _THREAD_ID),
    Attack("be killed by a child", "own", _CHILD_KILLS, tiers={"self": ("ok", "error")}),
    Attack("a child's end as a signal", "own", _LAST_WORD),
    Attack("other ways to a SIGKILL", "own", _TIMERS, expect=("ok", "cpu_limit")),
    Attack("forge a report, then exit", "#68", _FORGE, ("exit",), control=Control.NONE, why=_NONE, plain=True),
    Attack(
        "forge a success, then raise", "#68", _FORGE_OK, ("error", "exit"), control=Control.NONE, why=_NONE, plain=True
    ),
    Attack("garbage as report", "#68", _GARBAGE, ("exit",), control=Control.NONE, why=_NONE, plain=True),
    Attack(
        "flood the report", "own", _FLOOD, ("output_limit",), control=Control.NONE, why=_NONE, limits=LIMITS, plain=True
    ),
    Attack("close every descriptor", "own", _CLOSE, ("ok",), control=Control.NONE, why=_NONE, plain=True),
    Attack(
        "replace the report by a pipe",
        "own",
        _SWAP,
        ("exit", "error", "timeout"),
        control=Control.NONE,
        why=_NONE,
        plain=True,
    ),
)
