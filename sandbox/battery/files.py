"""Attacks on files: reading, writing and changing what is outside, and games with links, descriptors and /proc."""

# ruff: noqa: E501 (programs)
from __future__ import annotations

from sandbox.battery.attack import Attack, Control

_READ = """
outside = told["folder"] + "/secret"
def read(path):
    with open(path, "rb") as file:
        return len(file.read(64))
attempt("read a file outside", lambda: read(outside))
attempt("list a folder outside", lambda: os.listdir(told["folder"]))
attempt("read the password file", lambda: read("/etc/shadow") if not told["unconfined"] or os.path.exists("/etc/shadow") else 0)
attempt("read this package", lambda: read(told["package"]))
os.symlink(outside, "link")
attempt("read through a symbolic link", lambda: read("link"))
attempt("read through ..", lambda: read("../" * 40 + outside))
attempt("read through /proc/self/root", lambda: read("/proc/self/root" + outside))
attempt("read through /proc/self/cwd", lambda: read("/proc/self/cwd/" + "../" * 40 + outside))
attempt("read by a folder's descriptor", lambda: os.open(outside[1:], os.O_RDONLY, dir_fd=os.open("/", os.O_RDONLY | os.O_DIRECTORY)))
attempt("run a file outside", lambda: os.close(os.open(told["folder"] + "/secret", os.O_RDONLY)))
attempt("map a file outside", lambda: __import__("mmap").mmap(os.open(outside, os.O_RDONLY), 0, prot=1)[:4])
"""
_WRITE = """
folder = told["folder"]
def write(path, flags=os.O_WRONLY | os.O_CREAT):
    fd = os.open(path, flags, 0o666)
    os.write(fd, b"breach")
    os.close(fd)
attempt("write a file outside", lambda: write(folder + "/victim"))
attempt("create a file outside", lambda: write(folder + "/new"))
attempt("truncate a file outside", lambda: os.truncate(folder + "/victim", 0))
attempt("make a folder outside", lambda: os.mkdir(folder + "/made"))
attempt("rename a file outside", lambda: os.rename(folder + "/victim", folder + "/moved"))
attempt("link a file outside in here", lambda: os.link(folder + "/secret", "hard"))
attempt("link into the outside", lambda: os.symlink("/", folder + "/soft"))
attempt("unnamed file outside", lambda: write(folder, os.O_WRONLY | os.O_TMPFILE))
attempt("named pipe outside", lambda: os.mkfifo(folder + "/pipe"))
attempt("delete a file outside", lambda: os.remove(folder + "/secret"))
"""
_OWN_DATA = """
folder = told["folder"]
for place in ("/usr", "/lib", os.path.dirname(os.__file__), "/etc", "/"):
    path = place + "/retool-battery-mark"
    if not told["unconfined"]:
        attempt(f"write to {place}", lambda: os.open(path, os.O_WRONLY | os.O_CREAT))
for path in ("/proc/sys/kernel/core_pattern", "/proc/sysrq-trigger", "/sys/fs/cgroup/cgroup.procs", "/proc/self/oom_score_adj"):
    if not told["unconfined"] and path != "/proc/self/oom_score_adj":
        attempt(f"open {path} to write", lambda: os.open(path, os.O_WRONLY))
for path in ("/dev/mem", "/dev/kmsg", "/dev/kvm", "/dev/fuse", "/dev/ptmx", "/dev/vda", "/dev/sda"):
    if not told["unconfined"]:
        attempt(f"open {path}", lambda: os.open(path, os.O_RDONLY))
"""
_METADATA = """
folder, path = told["folder"], told["folder"] + "/victim"
attempt("change a mode outside", lambda: os.chmod(path, 0o600))
attempt("change a time outside", lambda: os.utime(path, (1, 1)))
attempt("let a device seem written to now", lambda: os.utime("/dev/null"))
attempt("change an owner outside", lambda: os.chown(path, os.getuid(), os.getgid() + 0))
attempt("set an attribute outside", lambda: os.setxattr(path, "user.battery", b"x"))
attempt("list the attributes of a file outside", lambda: os.listxattr(path))
attempt("read an attribute outside", lambda: os.getxattr(path, "user.battery"))
"""
_STAT = """
path = told["folder"] + "/victim"
attempt("see that a file exists", lambda: os.stat(path).st_size)
attempt("change the folder to one outside", lambda: os.chdir(told["folder"]))
"""
_LEASE = """
# Whoever opens a leased file waits for the holder, the host's programs too.
with open("own", "w") as file:
    pass
own = os.open("own", os.O_RDONLY)
attempt("lease a file", lambda: fcntl.fcntl(own, fcntl.F_SETLEASE, fcntl.F_RDLCK))
attempt("be told what happens in a folder", lambda: fcntl.fcntl(os.open(".", os.O_RDONLY), fcntl.F_NOTIFY, fcntl.DN_CREATE))
"""
_WATCH = """
attempt("watch a folder outside", lambda: checked(libc.inotify_add_watch(checked(libc.inotify_init()), told["folder"].encode(), 0xFFF)))
reach("watch the whole file system", "fanotify_init", 0, 0)
"""
_HANDLES = """
handle = (ctypes.c_uint32 * 34)(128)
reach("make a file handle", "name_to_handle_at", -100, told["folder"].encode(), handle, ctypes.byref(ctypes.c_int()), 0)
reach("open a file handle", "open_by_handle_at", -100, handle, 0)
"""
_PROC = """
me = told["pid"]
def read(path):
    with open(path, "rb") as file:
        return len(file.read(4096)) or 1 / 0
attempt("another's environment", lambda: read(f"/proc/{me}/environ"))
attempt("another's command line", lambda: read(f"/proc/{me}/cmdline"))
attempt("another's memory map", lambda: read(f"/proc/{me}/maps"))
attempt("another's memory", lambda: os.open(f"/proc/{me}/mem", os.O_RDONLY))
attempt("another's descriptors", lambda: os.listdir(f"/proc/{me}/fd"))
attempt("another's working folder", lambda: os.listdir(f"/proc/{me}/cwd"))
attempt("another's root", lambda: os.listdir(f"/proc/{me}/root"))
attempt("more than 5 processes", lambda: len([n for n in os.listdir("/proc") if n.isdigit()][5]))
first = me if told["unconfined"] else 1
attempt("the environment of process 1", lambda: read(f"/proc/{first}/environ"))
attempt("the memory of process 1", lambda: os.open(f"/proc/{first}/mem", os.O_RDWR))
"""
_ENVIRONMENT = """
allowed = {"PATH", "LANG", "LC_ALL", "LC_CTYPE", "TZ", "HOME", "TMPDIR", "PWD", "PYTHONHASHSEED", "PYTHONDONTWRITEBYTECODE", "MALLOC_ARENA_MAX"}
extra = [n for n in os.environ if n not in allowed and not n.endswith("_NUM_THREADS") and n != "VECLIB_MAXIMUM_THREADS"]
if told["unconfined"]:
    os.environ["BATTERY_TOKEN"] = "x"
    extra.append("BATTERY_TOKEN")
say("did" if extra else "refused", "find unexpected variables", extra)
text = ""
try:
    text = open("/proc/self/environ").read()
except OSError:
    pass
say("refused" if told["secret"] not in text and not told["unconfined"] else "did", "find a secret in the environment")
"""
_DESCRIPTORS = """
held = []
for fd in range(3, 4096):
    try:
        held.append((fd, os.fstat(fd).st_mode))
    except OSError:
        pass
if told["unconfined"]:
    held += [(0, stat.S_IFREG), (0, stat.S_IFDIR)]
others = [row for row in held if not stat.S_ISSOCK(row[1])]
say("did" if others else "refused", "inherit a descriptor other than the report", others)
say("did" if len(held) > 1 else "refused", "inherit more than one descriptor", held)
"""
_SELF_FD = """
# Whatever is open must not name a file outside, and must not be a way to its folder.
for number in range(0, 1100):
    try:
        target = os.readlink(f"/proc/self/fd/{number}")
    except OSError:
        continue
    if target.startswith("/") and not target.startswith((os.getcwd(), "/dev/null", "/memfd", "/proc")):
        say("did", "hold a descriptor of a file outside", target)
        break
else:
    say("did" if told["unconfined"] else "refused", "hold a descriptor of a file outside")
"""
_NAMES = """
for name in (b"\\xff\\xfe", b"line\\nbreak", b"-rf", b"x" * 255, b"\\x1b[31m", b" ", b"..."):
    os.close(os.open(name, os.O_CREAT | os.O_WRONLY))
os.makedirs("a/b/c")
os.symlink("loop", "loop")
try:
    os.chmod("a", 0)
except PermissionError:
    pass  # in tier `self` modes cannot be changed at all
print("done")
"""
_DEEP = """
import os
for _ in range(1200):
    os.mkdir("d")
    os.chdir("d")
print("done")
"""
_SPECIAL = """
attempt("make a block device", lambda: os.mknod("disk", 0o60660, os.makedev(8, 0)))
attempt("make a character device", lambda: os.mknod("memory", 0o20660, os.makedev(1, 1)))
"""
_CORE = """
import ctypes, os, resource
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
ctypes.string_at(0)
"""
_SHARED = """
seen = []
for place in ("/tmp", "/dev/shm", "/var/tmp", "/run", ".."):
    try:
        seen += [os.path.join(place, n) for n in os.listdir(place)]
    except OSError:
        pass
left = [path for path in seen if "battery-left" in path]
for place in ("/tmp", "/dev/shm", "."):
    try:
        open(place + "/battery-left", "w").close()
    except OSError:
        pass
if told["unconfined"]:
    open("/tmp/battery-left", "w").close()
    left = [n for n in os.listdir("/tmp") if n == "battery-left"]
    os.remove("/tmp/battery-left")
    if os.path.exists("/dev/shm/battery-left"):
        os.remove("/dev/shm/battery-left")
say("did" if left else "refused", "find files of an earlier run", left)
"""

_NO_HARM = "would change this machine"
ATTACKS = (
    # The package is readable where it is installed beside the interpreter's other libraries; nothing secret is in it.
    Attack("read outside", "#27 #28", _READ, known=dict.fromkeys(("ns", "uid", "self"), ("read this package",))),
    Attack("write outside", "#33", _WRITE),
    Attack("system files and devices", "#33 #51", _OWN_DATA, control=Control.NONE, why=_NO_HARM),
    Attack("metadata outside", "own", _METADATA, known={"uid": ("let a device seem written to now",)}),
    Attack(
        "look around outside",
        "own",
        _STAT,
        known={
            "uid": ("see that a file exists", "change the folder to one outside"),
            "self": ("see that a file exists", "change the folder to one outside"),
        },
    ),
    Attack("leases and notices", "own", _LEASE),
    Attack("watch outside", "own", _WATCH),
    Attack("file handles", "own", _HANDLES),
    Attack("processes in /proc", "#24 #25 #26", _PROC),
    Attack("environment", "#23", _ENVIRONMENT),
    Attack("inherited descriptors", "#41", _DESCRIPTORS),
    Attack("descriptors of outside files", "own", _SELF_FD),
    Attack(
        "odd file names",
        "#22",
        _NAMES,
        says="^done\n$",
        control=Control.NONE,
        why="what is checked is that the work folder can be removed",
    ),
    Attack(
        "a very deep folder",
        "own",
        _DEEP,
        says="^done\n$",
        control=Control.NONE,
        why="what is checked is that the work folder can be removed",
        plain=True,
    ),
    Attack("device nodes", "#50", _SPECIAL),
    Attack("crash without a core file", "#54", _CORE, ("signal",), control=Control.KILLS, plain=True),
    Attack("leave files for the next run", "own #35", _SHARED),
    Attack("find files of the run before", "own #35", _SHARED),
)
