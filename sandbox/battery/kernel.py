"""Attacks on the kernel's surface: calls that ordinary programs never make and exploits often do."""

# ruff: noqa: E501 (programs)
from __future__ import annotations

from sandbox.battery.attack import Attack, Control

_NAMESPACES = """
for label, flag in (("user", 0x10000000), ("mount", 0x20000), ("process", 0x20000000), ("network", 0x40000000),
                    ("IPC", 0x8000000), ("host name", 0x4000000), ("cgroup", 0x2000000), ("time", 0x80)):
    def enter():
        pid = os.fork() if told["unconfined"] else 0
        if pid:
            if os.waitpid(pid, 0)[1]:
                raise PermissionError(1, "refused")
            return
        failed = libc.unshare(flag)
        if told["unconfined"]:
            os._exit(1 if failed else 0)
        checked(failed)
    attempt(f"new {label} namespace", enter)
def clone(flags):
    pid = call("clone", flags | 17, 0, 0, 0, 0)
    if pid == 0:
        os._exit(0)
    os.waitpid(pid, 0)
attempt("clone into a user namespace", lambda: clone(0x10000000))
attempt("clone into a network namespace", lambda: clone(0x40000000 | 0x10000000))
reach("clone3", "clone3", 0, 0)
reach("join a namespace", "setns", 0, 0)
"""
_MOUNTS = """
none = 0
reach("mount", "mount", 0, b"/nonexistent", 0, 0, 0)
reach("open a file system", "fsopen", b"nonexistent", 0)
reach("open a tree", "open_tree", -100, b"/nonexistent", 0)
reach("move a mount", "move_mount", -100, b"/nonexistent", -100, b"/nonexistent", 0)
reach("change a mount", "mount_setattr", -100, b"/nonexistent", 0, 0, 0)
reach("unmount", "umount2", b"/nonexistent", 0)
reach("pivot_root", "pivot_root", b"/nonexistent", b"/nonexistent")
reach("chroot", "chroot", b"/")
"""
_SURFACE = """
reach("bpf", "bpf", 0, 0, 0)
reach("perf events", "perf_event_open", 0, 0, ctypes.c_long(-1), ctypes.c_long(-1), 0)
reach("userfaultfd", "userfaultfd", 0xFFFF)
reach("load a kernel", "kexec_load", 0, 0, 0, 0xFFFF)
reach("load a module", "init_module", 0, 0, 0)
reach("load a module file", "finit_module", -1, 0, 0xFFFF)
reach("add a key", "add_key", 0, 0, 0, 0, 0)
reach("request a key", "request_key", 0, 0, 0, 0)
reach("key control", "keyctl", 0xFFFF, 0, 0, 0, 0)
reach("SysV shared memory", "shmget", 1, 0, 0)
reach("SysV messages", "msgget", 1, 0)
reach("SysV semaphores", "semget", 1, 0, 0)
reach("POSIX messages", "mq_open", 0, 0, 0, 0)
reach("personality", "personality", 0xFFFFFFFF)
reach("hidden memory", "memfd_secret", 0xFFFF)
reach("a timer with a signal", "timer_create", 0xFFFF, 0, 0)
reach("kernel log", "syslog", 3, 0, ctypes.c_long(-1))
reach("accounting", "acct", b"/nonexistent/x")
reach("swap", "swapon", b"/nonexistent", 0)
reach("quotas", "quotactl", 0xFFFFFF, 0, 0, 0)
reach("restart the machine", "reboot", 0, 0, 0, 0)
reach("set the clock", "clock_settime", 0xFFFF, 0)
reach("tune the clock", "adjtimex", 0)
reach("host name", "sethostname", 0, ctypes.c_long(-1))
reach("I/O privilege", "iopl", 9)
reach("I/O ports", "ioperm", 0xFFFFFFF, 1, 1)
reach("segment table", "modify_ldt", 0xFF, 0, 0)
reach("memory policy", "mbind", 0, 0, 0xFF, 0, 0, 0)
reach("move a process's memory", "migrate_pages", 0, 0, 0, 0)
reach("hang up the terminal", "vhangup") if not told["unconfined"] else None
"""
_FILTERS = """
# Filters and rule sets may only narrow; stacking them until the kernel refuses hurts nobody else.
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
allow = ctypes.create_string_buffer(struct.pack("=HBBI", 6, 0, 0, 0x7FFF0000) * 4000)
allow_one = Program(4000, ctypes.addressof(allow))
count = 0
while count < 64 and libc.prctl(22, ctypes.c_ulong(2), ctypes.byref(allow_one)) == 0:
    count += 1
print("stacked", count)
number = libc.socket(2, 1, 0)
say("did" if number >= 0 else "refused", "open a socket after stacking filters")
reach("a filter with a listener", "seccomp", 1, 8, 0)
"""
_OWN_FILTER = """
import ctypes, os, struct
class Program(ctypes.Structure):
    _fields_ = [("length", ctypes.c_ushort), ("filter", ctypes.c_void_p)]
steps = [(0x20, 0, 0, 0), (0x15, 0, 1, {"x86_64": 231}.get(os.uname().machine, 94)), (6, 0, 0, 0x50001), (6, 0, 0, 0x7FFF0000)]
text = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *step) for step in steps))
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
ctypes.CDLL(None).prctl(22, ctypes.c_ulong(2), ctypes.byref(Program(len(steps), ctypes.addressof(text))))
while True:
    os._exit(0)
"""
_MACHINE_CODE = """
# The same kernel through its other doors: 32-bit calls and x32 numbers bypass a filter that only knows one.
import mmap
def run(code):
    page = mmap.mmap(-1, 4096, prot=7)
    page.write(bytes(code))
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    return ctypes.CFUNCTYPE(ctypes.c_long)(address)()
def door(label, code):
    pid = os.fork()
    if pid == 0:
        try:
            value = run(code)
        except BaseException:
            os._exit(1)
        os._exit(0 if value > 0 else 1)
    status = os.waitpid(pid, 0)[1]
    say("did" if status == 0 else "refused", label, status)
if os.uname().machine == "x86_64":
    door("getpid by a 32-bit call", [0xB8, 20, 0, 0, 0, 0xCD, 0x80, 0xC3])
    x32 = 0x40000000 + 39
    door("getpid by an x32 number", [0xB8, *x32.to_bytes(4, "little"), 0x0F, 0x05, 0xC3] if not told["unconfined"]
        else [0xB8, 39, 0, 0, 0, 0x0F, 0x05, 0xC3])
"""
_TERMINAL = """
def push(request):
    left, right = os.pipe()
    libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_char_p]
    if libc.ioctl(left, request, b"x") < 0 and ctypes.get_errno() in (errno.EPERM, errno.EACCES):
        raise PermissionError(1, "refused")
    return ctypes.get_errno()
attempt("type into the terminal", lambda: push(0x5412))
attempt("paste into the console", lambda: push(0x541C))
"""
_HIGH_BITS = """
# Filters see 64 bits, the kernel often 32: what is judged by an argument must be judged alike in both.
reach("kill with high bits", "clone", ctypes.c_ulong((1 << 40) | 0x10000000 | 17), 0, 0, 0, 0)
def high(name, *args):
    return call(name, *(ctypes.c_ulong(a) for a in args))
if not told["unconfined"]:
    attempt("SIGKILL oneself with high bits", lambda: high("tgkill", os.getpid(), threading.get_native_id(), (1 << 32) | 9))
    number = {"x86_64": 62}.get(os.uname().machine, 129)
    attempt("kill oneself with high bits", lambda: checked(libc.syscall(number, ctypes.c_ulong((1 << 32) | os.getpid()), 9)))
    number = {"x86_64": 157}.get(os.uname().machine, 167)
    attempt("prctl with high bits", lambda: checked(libc.syscall(number, ctypes.c_ulong((1 << 32) | 1), 9, 0, 0, 0)))
    number = {"x86_64": 302}.get(os.uname().machine, 261)
    attempt("limits of another with high bits", lambda: checked(libc.syscall(number, ctypes.c_ulong((1 << 32) | told["pid"]), 7, 0, ctypes.create_string_buffer(16))))
"""
_MEMORY = """
attempt("lock memory", lambda: checked(libc.mlock(ctypes.create_string_buffer(1 << 20), 1 << 20)))
def poison():
    import mmap
    room = mmap.mmap(-1, 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(room))
    return checked(libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(4096), 100))
if not told["unconfined"]:
    attempt("poison a page", poison)
def zero_page():
    libc.mmap.restype = ctypes.c_void_p
    room = libc.mmap(ctypes.c_void_p(0), 4096, 3, 0x32, -1, 0)
    if room == ctypes.c_void_p(-1).value:
        raise PermissionError(1, "refused")
if not told["unconfined"]:
    attempt("map page zero", zero_page)
"""

_HOST = "would change or endanger this machine"
ATTACKS = (
    Attack("namespaces", "#47", _NAMESPACES, tiers={"self": ("ok",)}),
    Attack("mounts", "#48 #49", _MOUNTS),
    Attack("kernel surface", "#45 #64", _SURFACE),
    Attack("stacked filters", "own", _FILTERS, control=Control.WORKS),
    Attack(
        "a filter that forbids to exit",
        "own",
        _OWN_FILTER,
        ("timeout", "cpu_limit", "exit", "signal", "ok"),
        control=Control.NONE,
        why="hurts only itself",
        plain=True,
    ),
    Attack("32-bit calls and x32 numbers", "own", _MACHINE_CODE, tiers={"self": ("error",)}),
    Attack("terminal injection", "own", _TERMINAL),
    Attack("arguments with high bits", "own", _HIGH_BITS),
    Attack("memory tricks", "#64 own", _MEMORY),
)
