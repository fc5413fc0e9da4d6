"""Attacks on other processes: signals, tracing, memory, priorities, descriptors."""

# ruff: noqa: E501 (programs)
from __future__ import annotations

from sandbox.battery.attack import Attack, Control

_SIGNALS = """
victim = told["pid"]
attempt("signal a process outside", lambda: os.kill(victim, signal.SIGURG))
attempt("ask whether a process outside lives", lambda: os.kill(victim, 0))
attempt("hold a descriptor of a process outside", lambda: os.close(os.pidfd_open(victim)))
attempt("signal the service", lambda: os.kill(told["service"], 0))
attempt("signal a group outside", lambda: os.killpg(victim, 0))
def by_descriptor():
    signal.pidfd_send_signal(os.pidfd_open(victim), signal.SIGURG)
attempt("signal by a descriptor", by_descriptor)
attempt("signal a thread outside", lambda: call("tgkill", victim, victim, int(signal.SIGURG)))
info = (ctypes.c_int * 32)(int(signal.SIGURG), 0, -1)
attempt("queue a signal", lambda: call("rt_sigqueueinfo", victim, int(signal.SIGURG), info))
attempt("queue a signal to a thread", lambda: call("rt_tgsigqueueinfo", victim, victim, int(signal.SIGURG), info))
def by_io():
    left, right = socket.socketpair()
    fcntl.ioctl(left, 0x8901, struct.pack("i", victim))  # FIOSETOWN
    fcntl.ioctl(left, 0x5452, struct.pack("i", 1))  # FIOASYNC
    right.send(b"x")
    if not told["unconfined"]:
        raise PermissionError(1, "judged by whether the signal arrives")
attempt("signal by asynchronous input", by_io)
"""
_PARENTS = """
# SIGURG does nothing to whoever is hit by mistake; signal 0 only asks.
for label, pid in (("its parent", os.getppid()), ("process 1", 1)):
    attempt(f"signal {label}", lambda: os.kill(pid, signal.SIGURG) if pid != 1 or not told["unconfined"] else os.kill(1, 0))
"""
_EVERYBODY = """
import signal, os
for number in (1, 2, 3, 15):
    signal.signal(number, signal.SIG_IGN)
for number in (23, 15, 1, 2):
    try:
        os.kill(-1, number)
    except OSError:
        pass
print("still here")
"""
_TRACE = """
victim = told["pid"]
def attach():
    call("ptrace", 16, victim, 0, 0)
    os.waitpid(victim, 0)
    call("ptrace", 17, victim, 0, 0)
attempt("attach to a process outside", attach)
attempt("be traced by the parent", lambda: call("ptrace", 0, 0, 0, 0))
class Vector(ctypes.Structure):
    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]
room = ctypes.create_string_buffer(64)
def peek(pid):
    maps = open(f"/proc/{pid}/maps").read() if told["unconfined"] else ""
    address = int(maps.split("-")[0], 16) if maps else 0x400000
    return call("process_vm_readv", pid, ctypes.byref(Vector(ctypes.addressof(room), 16)), 1, ctypes.byref(Vector(address, 16)), 1, 0)
attempt("read memory of a process outside", lambda: peek(victim))
reach("write memory of a process outside", "process_vm_writev", victim, 0, 0, 0, 0, 0)
attempt("take a descriptor of a process outside", lambda: call("pidfd_getfd", os.pidfd_open(victim), 1, 0))
reach("compare with a process outside", "kcmp", os.getpid(), victim, 0, 0, 0)
reach("advise a process outside", "process_madvise", -1, 0, 0, 0, 0)
reach("move pages of a process outside", "move_pages", victim, 0, 0, 0, 0, 0)
"""
_PRIORITY = """
victim = told["pid"]
reach("raise one's own priority", "setpriority", 0, 0, ctypes.c_long(-5))
reach("lower a process outside", "setpriority", 0, victim, 5)
reach("become a real-time process", "sched_setscheduler", 0, 1, ctypes.byref(ctypes.c_int(1)))
reach("set a deadline policy", "sched_setattr", 0, 0, 0)
reach("set a disk priority", "ioprio_set", 1, 0, 0)
attempt("pin a process outside", lambda: os.sched_setaffinity(victim, os.sched_getaffinity(victim)))
attempt("limit a process outside", lambda: resource.prlimit(victim, resource.RLIMIT_CORE, (0, 0)))
def read_limits():
    return resource.prlimit(victim, resource.RLIMIT_CORE)
attempt("read the limits of a process outside", read_limits)
"""
_PRCTL = """
def prctl(*values):
    return checked(libc.prctl(*(ctypes.c_ulong(value) for value in (*values, 0, 0, 0, 0)[:5])))
attempt("die with nobody", lambda: prctl(1, 0))
attempt("collect orphans", lambda: prctl(36, 1))
attempt("change the memory map's record", lambda: prctl(35, 1, 0) if not told["unconfined"] else 0)
attempt("keep capabilities", lambda: prctl(8, 1))
attempt("ambient capability", lambda: prctl(47, 4))
attempt("machine-check policy", lambda: prctl(33, 0, 0))
"""
_SHARED = """
def shared():
    with open("/proc/self/maps") as maps:
        rights = [line.split()[1] for line in maps]
    return [found for found in rights if "w" in found and found.endswith("s")][0]
attempt("find memory that others can write", shared)
"""
_ROBUST = """
import struct
victim = told["pid"]
def list_of(pid):
    head, size = ctypes.c_void_p(), ctypes.c_size_t()
    number = {"x86_64": 274}.get(os.uname().machine, 100)
    return checked(libc.syscall(number, pid, ctypes.byref(head), ctypes.byref(size)))
attempt("robust list of a process outside", lambda: list_of(victim))
# A robust list that points to itself, then to nowhere: the kernel walks it when the thread ends.
number = {"x86_64": 273}.get(os.uname().machine, 99)
ring = (ctypes.c_ulong * 3)()
ring[0] = ctypes.addressof(ring)
def thread():
    libc.syscall(number, ctypes.byref(ring), 24)
    time.sleep(0.01)
first = threading.Thread(target=thread)
first.start()
first.join()
broken = (ctypes.c_ulong * 3)(0x10, 0, 0x10)
libc.syscall(number, ctypes.byref(broken), 24)
os._exit(0)
"""
_MEMFD = """
# Running code from memory is allowed; it runs under the same jail, which is what is judged.
fd = os.memfd_create("program", 0)
source = open("/bin/cat", "rb").read()
os.write(fd, source)
done = subprocess.run([f"/proc/self/fd/{fd}", told["folder"] + "/secret"], pass_fds=(fd,), capture_output=True)
say("did" if told["secret"].encode() in done.stdout else "refused", "read outside from a program in memory", done.returncode)
"""
_SHELL = """
done = subprocess.run(["/bin/sh", "-c", f"cat {told['folder']}/secret; echo x > {told['folder']}/by-shell; kill -URG {told['pid']}; true"],
    capture_output=True)
say("did" if told["secret"].encode() in done.stdout else "refused", "read outside by the shell", done.stderr)
"""
_SET_ID = """
# No set-user-id program gives anything back, and no id can be taken.
for name in ("/bin/su", "/usr/bin/su", "/usr/bin/passwd", "/bin/mount", "/usr/bin/newgrp"):
    if os.path.exists(name) and not told["unconfined"]:
        pid = os.fork()
        if pid == 0:
            devnull = os.open("/dev/null", os.O_RDWR)
            for fd in (0, 1, 2):
                os.dup2(devnull, fd)
            try:
                os.execv(name, [name, "--help"])
            finally:
                os._exit(9)
        os.waitpid(pid, 0)
attempt("become root", lambda: os.setuid(0) if os.getuid() or not told["unconfined"] else 0)
attempt("become the first user id", lambda: (os.setresuid(0, 0, 0), os.setresgid(0, 0, 0)))
attempt("join other groups", lambda: os.setgroups([0, 1, 2]))
status = {}
try:
    status = dict(line.split(":\\t", 1) for line in open("/proc/self/status") if ":\\t" in line)
except OSError:
    pass  # judged in the tiers that have a /proc; elsewhere by what follows from capabilities
capable = [name for name in ("CapEff", "CapPrm", "CapBnd", "CapInh", "CapAmb") if int(status.get(name, "0"), 16)]
say("did" if capable else "refused", "hold a capability", capable)
say("refused" if status.get("NoNewPrivs", "1").strip() == "1" else "did", "gain privileges by running a program")
"""
_EXEC_FAILS = """
# A program whose loading fails after the point of no return: the kernel kills the process, and not by SIGKILL.
import os, resource
resource.setrlimit(resource.RLIMIT_AS, (1 << 20, 1 << 20))
os.execv("/bin/true", ["/bin/true"])
"""
_VFORK = """
for _ in range(20):
    if told["calls"]:
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            os.execv("/bin/true", ["/bin/true"])
        os.waitpid(pid, 0)
print("done")
"""

_NO_PROCESSES = {"self": ("error",)}
ATTACKS = (
    Attack("signals outside", "#42", _SIGNALS),
    Attack("signals to the parent", "#42", _PARENTS, known={"ns": ("signal process 1", "signal its parent")}),
    Attack(
        "signals to everybody",
        "#42",
        _EVERYBODY,
        says="^still here\n$",
        control=Control.NONE,
        why="would signal every process of this machine",
        plain=True,
    ),
    Attack("trace, read and rob others", "#43", _TRACE),
    Attack("priorities and limits of others", "own #64", _PRIORITY),
    Attack("prctl games", "own", _PRCTL),
    Attack("robust futex lists", "own", _ROBUST),
    Attack(
        "memory shared with other runs",
        "own",
        _SHARED,
        control=Control.NONE,
        why="there is no other run without the sandbox",
    ),
    Attack("run a program from memory", "#52", _MEMFD, tiers=_NO_PROCESSES),
    Attack("shell", "#53", _SHELL, tiers=_NO_PROCESSES),
    Attack("set-user-id and capabilities", "#49", _SET_ID, tiers=_NO_PROCESSES),
    Attack(
        "a program that cannot be loaded",
        "own",
        _EXEC_FAILS,
        ("signal", "exit", "error", "memory_limit"),
        control=Control.KILLS,
        plain=True,
    ),
    Attack(
        "many short children",
        "own",
        _VFORK,
        says="^done\n$",
        tiers=_NO_PROCESSES,
        control=Control.NONE,
        why="ordinary work; what is checked is that it is all reaped",
    ),
)
