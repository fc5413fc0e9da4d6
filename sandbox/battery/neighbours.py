"""Attacks on another run that is under way at the same time."""

# ruff: noqa: E501 (programs)
from __future__ import annotations

from dataclasses import replace

from sandbox.battery.attack import LIMITS, PRELUDE, Attack

_VICTIM = (
    PRELUDE
    + """
name = "battery-neighbour-" + told["secret"][:8]
for place in ("/tmp", "/dev/shm", "."):
    try:
        with open(f"{place}/{name}", "w") as file:
            file.write(told["secret"])
        os.chmod(f"{place}/{name}", 0o666)
    except OSError:
        pass
caught = []
signal.signal(signal.SIGURG, lambda *_: caught.append(1))
end = time.monotonic() + 3
while time.monotonic() < end and not caught:
    time.sleep(0.05)
for place in ("/tmp", "/dev/shm", "."):
    try:
        os.remove(f"{place}/{name}")
    except OSError:
        pass
say("did" if caught else "refused", "be signalled by a neighbour")
"""
)
_HIDER = _VICTIM[: _VICTIM.rindex("say(")]
_SEARCH = """
import glob
name = "battery-neighbour-" + told["secret"][:8]
here = os.getcwd()
places = ["/tmp", "/dev/shm", "/var/tmp", os.path.dirname(here)]
found, read = [], []
last = os.path.basename(here)
near = [os.path.join(os.path.dirname(here), str(int(last) + step)) for step in range(-30, 30) if step] if last.isdigit() else []
end = time.monotonic() + 2
while time.monotonic() < end and not read:
    for place in [*places, *near, *glob.glob("/proc/[0-9]*/cwd"), *glob.glob(os.path.dirname(here) + "/*")]:
        path = f"{place}/{name}"
        try:
            read.append(open(path).read())
            found.append(path)
        except OSError:
            if os.path.exists(path):
                found.append(path)
    time.sleep(0.1)
say("did" if read else "refused", "read a neighbour's file", found)
"""
_SIGNAL = """
signalled = []
end = time.monotonic() + 2
while time.monotonic() < end:
    for pid in range(max(2, os.getpid() - 60), os.getpid() + 60):
        if pid in (os.getpid(), told["pid"], told["service"]):
            continue
        try:
            with open(f"/proc/{pid}/cmdline", "rb") as file:
                if told["unconfined"] and b"battery-neighbour" not in file.read():
                    continue
        except OSError:
            if told["unconfined"]:
                continue
        try:
            os.waitpid(pid, os.WNOHANG | 0x40000000)
            continue  # a child of our own: the anchor
        except ChildProcessError:
            pass
        try:
            os.kill(pid, signal.SIGURG)
            if pid != os.getppid():
                signalled.append(pid)
        except OSError:
            pass
    time.sleep(0.1)
say("did" if signalled else "refused", "signal a neighbour", signalled)
"""
_QUOTA = """
# What all pipes of a kernel user hold together is limited; beyond it new ones are small.
held = []
def enlarge():
    for _ in range(3 if told["unconfined"] else 100):  # the control runs at the same time, perhaps as the same user
        held.append(os.pipe())
        fcntl.fcntl(held[-1][1], 1031, 1 << 20)
attempt("enlarge pipes", enlarge)
time.sleep(2)
"""
_PIPES = (
    PRELUDE
    + """
end = time.monotonic() + 1.5
while time.monotonic() < end:
    pipe = os.pipe()
    if fcntl.fcntl(pipe[1], 1032) < 65536 and not told["unconfined"]:
        say("did", "leave a neighbour only small pipes")
        break
    os.close(pipe[0])
    os.close(pipe[1])
    time.sleep(0.05)
"""
)

_LONG = replace(LIMITS, wall_s=20)
ATTACKS = (
    Attack("a neighbour's files", "#27 #35", _SEARCH, neighbour=_HIDER, limits=_LONG),
    Attack("a neighbour's processes", "#43 own", _SIGNAL, neighbour=_VICTIM, limits=_LONG),
    Attack("a neighbour's pipes", "own", _QUOTA, neighbour=_PIPES, limits=_LONG),
)
