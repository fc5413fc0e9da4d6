"""The attacks that decide whether a tier holds. Each must work unconfined, none may confined.

An attack that fails without confinement proves nothing, so a tier is never believed on its account.
"""

from __future__ import annotations

SCRIPT = r"""
import json, os, socket, sys
told = json.loads(sys.stdin.readline())
breached = {}

def attack(name, act):
    try:
        breached[name] = bool(act())
    except BaseException:
        breached[name] = False

def read_outside():
    return open(told["canary"]).read() == told["secret"]

def write_outside():
    with open(os.path.join(told["outside"], "breach-" + told["name"]), "w") as file:
        file.write("x")
    return True

def network():
    reached = False
    for family, address in ((socket.AF_INET, ("127.0.0.1", told["port"])), (socket.AF_UNIX, told["abstract"])):
        try:
            with socket.socket(family, socket.SOCK_STREAM) as sock:
                sock.settimeout(1)
                sock.connect(address)
                reached = True
        except OSError:
            pass
    return reached

def datagrams():
    sent = False
    inet, unix = ("127.0.0.1", told["udp_port"]), told["abstract"] + "d"
    for family, address in ((socket.AF_INET, inet), (socket.AF_UNIX, unix)):
        try:
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.sendto(b"x", address)
                sent = True
        except OSError:
            pass
    return sent

def system_calls():
    for sock in socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM):
        sock.close()
    return True

def environment():
    return told["secret"].encode() in open(f"/proc/{told['pid']}/environ", "rb").read()

def daemon():
    # The double fork of a daemon; it keeps standard output open, which is how it is seen.
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            import time
            time.sleep(5)
        os._exit(0)
    os.wait()
    return True

attack("read", read_outside)
attack("write", write_outside)
attack("network", network)
attack("datagrams", datagrams)
attack("system calls", system_calls)
attack("signal", lambda: os.kill(told["pid"], 23) or True)  # SIGURG: harmless to whoever it hits by mistake
attack("environment", environment)
if told["daemon"]:
    attack("daemon", daemon)

def works():
    import csv, zipfile, wave  # modules nobody has imported yet
    with open("probe.txt", "w") as file:
        file.write("x")
    os.remove("probe.txt")
    for name in told["modules"]:
        __import__(name)
    for name in told["installed"]:  # other profiles' modules, too large to import here: they must be readable
        import importlib.util
        with open(importlib.util.find_spec(name).origin, "rb") as file:
            file.read(1)
    return True

try:
    works()
    why = ""
except BaseException as error:
    why = f"{type(error).__name__}: {error}"
sys.stdout.write(json.dumps({"breached": breached, "broken": why}) + "\n")
sys.stdout.flush()
"""
"""Reads one line of JSON, writes one. `signal` and `daemon` are judged by what we see, not by what it says."""

LAZY_MODULES = {"numpy": "numpy.polynomial.hermite_e", "sympy": "sympy.physics.units"}
"""Profile module -> a part of it that the warm interpreter has not imported: it must still be importable."""

NAMES = {
    "read": "read files outside",
    "write": "write files outside",
    "network": "connect to a listener",
    "datagrams": "send datagrams",
    "system calls": "make system calls that should be filtered",
    "signal": "signal a process outside",
    "environment": "read the supervisor's environment",
    "daemon": "leave a daemon behind",
}
