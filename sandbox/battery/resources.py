"""Attacks on what is scarce: processes, threads, memory, time, output, disk, descriptors."""

# ruff: noqa: E501 (programs)
from __future__ import annotations

from dataclasses import replace

from sandbox.battery.attack import LIMITS, Attack, Control

_SHORT = replace(LIMITS, wall_s=1.0)
_CPU = replace(LIMITS, cpu_s=1, wall_s=20)
_FEW = replace(LIMITS, processes=12)
_NO_CONTROL = "would exhaust this machine; the capped form beside it has a control"

_FORKS = """
made = 0
try:
    while made < 40:
        if os.fork() == 0:
            time.sleep(60)
            os._exit(0)
        made += 1
except OSError:
    pass
say("did" if made == 40 else "refused", "fork 40 children", made)
"""
_THREADS = """
made = 0
try:
    while made < 40:
        threading.Thread(target=time.sleep, args=(30,), daemon=True).start()
        made += 1
except RuntimeError:
    pass
say("did" if made == 40 else "refused", "start 40 threads", made)
os._exit(0)
"""
_MEMORY = """
held = []
for _ in range(20):
    held.append(bytearray(50_000_000))
say("did", "hold 1 GB", len(held))
"""
_CHILDREN_MEMORY = """
import mmap
ready, tell = os.pipe()
for _ in range(6):
    if os.fork() == 0:
        room = mmap.mmap(-1, 96 << 20)
        for _ in range(96):
            room.write(bytes(1 << 20))
        os.write(tell, b"+")
        time.sleep(30)
        os._exit(0)
os.close(tell)
full = 0
while full < 6 and select.select([ready], [], [], 3)[0] and os.read(ready, 1):
    full += 1
say("did" if full == 6 else "refused", "hold 4 times the limit in children", full)
"""
_MEMFDS = """
held = []
def fill():
    for _ in range(32):
        held.append(os.memfd_create("x"))
        os.posix_fallocate(held[-1], 0, 8 << 20)
    return len(held)
attempt("hold 256 MB in unmapped memory files", fill)
"""
_PIPES = """
held = []
def fill():
    for _ in range(100):
        held.append(os.pipe())
        fcntl.fcntl(held[-1][1], 1031, 1 << 20)
        os.set_blocking(held[-1][1], False)
        if os.write(held[-1][1], bytes(1 << 20)) < 1 << 20:
            raise BlockingIOError(11, "small pipe")
    return len(held)
attempt("hold 100 MB in pipes", fill)
"""
_DAEMON = """
import subprocess
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.closerange(0, 64)
        os.execv("/bin/sleep", ["/bin/sleep", "300"])
    os._exit(0)
os.wait()
time.sleep(0.1)
"""
_DISK = """
def big():
    with open("big", "wb") as file:
        for _ in range(40):
            file.write(bytes(1 << 20))
def sparse():
    with open("sparse", "wb") as file:
        file.truncate(1 << 40)
def many():
    for index in range(20):
        fd = os.open(f"many{index}", os.O_CREAT | os.O_WRONLY)
        os.posix_fallocate(fd, 0, 8 << 20)
        os.close(fd)
def inodes():
    for index in range(6000):
        os.close(os.open(f"inode{index}", os.O_CREAT | os.O_WRONLY))
attempt("one file of 40 MB", big)
attempt("one sparse file of 1 TB", sparse)
attempt("20 files of 8 MB", many)
attempt("6000 files", inodes)
"""
_DESCRIPTORS = """
import resource
held = []
def open_all():
    while len(held) < 2000:
        held.append(os.open("/dev/null", 0))
    return len(held)
def raise_limit():
    resource.setrlimit(resource.RLIMIT_NOFILE, (3000, 3000))
attempt("open 2000 files", open_all)
for fd in held:
    os.close(fd)
attempt("allow oneself 3000 files", raise_limit)
"""
_LIMITS_UP = """
for name, value in (("RLIMIT_AS", 1 << 40), ("RLIMIT_NPROC", 5000), ("RLIMIT_FSIZE", 1 << 40), ("RLIMIT_CORE", 1 << 20),
                    ("RLIMIT_MEMLOCK", 1 << 30)):
    kind = getattr(resource, name)
    if told["unconfined"]:
        resource.setrlimit(kind, (1 << 33 if name == "RLIMIT_AS" else value, resource.getrlimit(kind)[1]))
        say("did", f"raise {name}")
    else:
        attempt(f"raise {name}", lambda: resource.setrlimit(kind, (value, value)))
"""

ATTACKS = (
    Attack("fork cap", "#1", _FORKS, limits=_FEW),
    Attack(
        "fork storm",
        "#1",
        "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass",
        expect=("timeout", "cpu_limit"),
        control=Control.NONE,
        why=_NO_CONTROL,
        limits=replace(_FEW, wall_s=1),
        plain=True,
    ),
    Attack("thread bomb", "#2", _THREADS, limits=_FEW),
    Attack("memory bomb", "#3", _MEMORY, expect=("memory_limit",), tiers={"none": ("memory_limit",)}),
    Attack(
        "memory of many children",
        "#4",
        "import select\n" + _CHILDREN_MEMORY,
        limits=replace(LIMITS, memory_mb=128),
        expect=("ok", "memory_limit"),
        known=dict.fromkeys(("ns", "uid"), ("hold 4 times the limit in children",)),
        grouped=True,
        tiers={"self": ("error",)},
    ),
    Attack(
        "memory in unmapped files",
        "own",
        _MEMFDS,
        limits=replace(LIMITS, memory_mb=64),
        expect=("ok", "memory_limit"),
        known=dict.fromkeys(("ns", "uid", "self"), ("hold 256 MB in unmapped memory files",)),
        grouped=True,
    ),
    Attack(
        "memory in pipes",
        "own",
        _PIPES,
        limits=replace(LIMITS, memory_mb=64),
        expect=("ok", "memory_limit"),
        known={"self": ("hold 100 MB in pipes",)},
        grouped=True,
    ),
    Attack(
        "spin, deaf to signals",
        "#5",
        "import signal\nfor n in range(1, 65):\n  try: signal.signal(n, signal.SIG_IGN)\n  except (OSError, ValueError): pass\n"
        "while True: pass",
        expect=("cpu_limit",),
        control=Control.OUTLIVES,
        limits=_CPU,
        plain=True,
    ),
    Attack(
        "spin in C",
        "#6",
        "9**9**9",
        expect=("cpu_limit", "memory_limit"),
        control=Control.OUTLIVES,
        limits=_CPU,
        plain=True,
    ),
    Attack(
        "catastrophic regex",
        "#7",
        "import re; re.match(r'(a+)+$', 'a' * 40 + 'b')",
        expect=("cpu_limit",),
        control=Control.OUTLIVES,
        limits=_CPU,
        plain=True,
    ),
    Attack(
        "sleep", "#8", "import time; time.sleep(1e6)", ("timeout",), control=Control.OUTLIVES, limits=_SHORT, plain=True
    ),
    Attack(
        "wait for input",
        "#9",
        "input()",
        ("error",),
        control=Control.NONE,
        why="plain Python ends alike; what is checked is that it never hangs",
        plain=True,
    ),
    Attack(
        "input that is never read",
        "#10",
        "print('done')",
        says="^done\n$",
        stdin="x" * 4_000_000,
        control=Control.NONE,
        why="what is checked is that the supervisor does not block",
        plain=True,
    ),
    Attack(
        "infinite output",
        "#11",
        "import os, time\nwhile True:\n  os.write(1, b'x' * 4096); time.sleep(1e-4)",
        expect=("output_limit",),
        control=Control.OUTLIVES,
        plain=True,
    ),
    Attack(
        "300 KB of output",
        "#12",
        "print('x' * 300_000 + 'end')",
        says="^x{300000}end\n$",
        limits=replace(LIMITS, output_head_bytes=400_000),
        control=Control.NONE,
        why="what is checked is that nothing is lost",
        plain=True,
    ),
    Attack(
        "both streams flooded",
        "#13",
        "import os\nfor _ in range(200):\n  os.write(1, b'o' * 1000); os.write(2, b'e' * 1000)\nprint('end')",
        says="end\n$",
        control=Control.NONE,
        why="what is checked is that neither stream blocks the other",
        plain=True,
    ),
    Attack("daemon", "#15", _DAEMON, control=Control.LEAVES, tiers={"self": ("error",)}, plain=False),
    Attack(
        "disk fill",
        "#16 #17 #18 #19",
        _DISK,
        known=dict.fromkeys(("uid", "self"), ("20 files of 8 MB", "6000 files")),
        limits=replace(LIMITS, wall_s=40, cpu_s=20),  # it writes 160 MB, on whatever machine
    ),
    Attack("descriptor bomb", "#20", _DESCRIPTORS),
    Attack("raise limits", "#64", _LIMITS_UP),
    Attack(
        "a thread that never ends",
        "own",
        "import threading\ndef spin():\n  while True: pass\nthreading.Thread(target=spin).start()",
        ("timeout", "cpu_limit"),
        control=Control.OUTLIVES,
        limits=_SHORT,
        plain=True,
    ),
    Attack(
        "hang at exit",
        "own",
        "import atexit, time\natexit.register(time.sleep, 1e6)",
        ("timeout",),
        control=Control.OUTLIVES,
        limits=_SHORT,
        plain=True,
    ),
    Attack(
        "stop oneself",
        "own",
        "import os, signal\nos.kill(os.getpid(), signal.SIGSTOP)",
        ("timeout",),
        control=Control.OUTLIVES,
        limits=_SHORT,
        plain=True,
    ),
    Attack(
        "stop the whole group",
        "own",
        "import os, signal\nos.killpg(0, signal.SIGSTOP)",
        ("timeout",),
        control=Control.OUTLIVES,
        limits=_SHORT,
        plain=True,
    ),
    Attack(
        "alarm storm",
        "own",
        "import signal, time\nsignal.signal(14, lambda *_: None)\nsignal.setitimer(0, 1e-6, 1e-6)\nwhile True: time.sleep(1)",
        ("timeout", "cpu_limit"),
        control=Control.OUTLIVES,
        limits=_SHORT,
        plain=True,
    ),
    Attack(
        "output after the end",
        "own",
        "import os, time\nif os.fork() == 0:\n  time.sleep(0.3)\n  while True: os.write(1, b'z' * 4096)\nprint('end')",
        says="^end\n",
        tiers={"self": ("error",)},
        control=Control.LEAVES,
        plain=True,
    ),
)
