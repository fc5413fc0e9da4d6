"""Attacks over the network and over sockets of any kind."""

# ruff: noqa: E501 (programs)
from __future__ import annotations

from sandbox.battery.attack import Attack, Control

_CONNECT = """
def reach_tcp(address):
    with socket.socket(socket.AF_INET) as sock:
        sock.settimeout(2)
        sock.connect(address)
def send_udp(address):
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        return sock.sendto(b"x", address)
def listen():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()
attempt("connect to a listener", lambda: reach_tcp(("127.0.0.1", told["tcp"])))
attempt("send a datagram", lambda: send_udp(("127.0.0.1", told["udp"])))
attempt("listen", listen)
"""
_UNIX = """
def connect(address, kind=socket.SOCK_STREAM):
    with socket.socket(socket.AF_UNIX, kind) as sock:
        sock.connect(address)
attempt("connect to a socket file", lambda: connect(told["folder"] + "/service.sock"))
attempt("connect to an abstract socket", lambda: connect(told["abstract"]))
attempt("connect to an abstract datagram socket", lambda: connect(told["abstract"] + "d", socket.SOCK_DGRAM))
def bind():
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("here.sock")
attempt("bind a socket file", bind)
"""
_FAMILIES = """
for label, family, kind, protocol in (
    ("AF_INET stream", 2, 1, 0), ("AF_INET datagram", 2, 2, 0), ("AF_INET raw", 2, 3, 1), ("AF_UNIX", 1, 1, 0),
    ("AF_NETLINK", 16, 3, 0), ("AF_PACKET", 17, 3, 0), ("AF_INET6", 10, 1, 0), ("AF_ALG", 38, 5, 0),
    ("AF_VSOCK", 40, 1, 0), ("AF_BLUETOOTH", 31, 3, 0), ("AF_CAN", 29, 3, 1), ("AF_TIPC", 30, 1, 0), ("AF_RDS", 21, 5, 0),
    ("AF_KCM", 41, 2, 0), ("AF_XDP", 44, 3, 0), ("AF_SMC", 43, 1, 0), ("AF_QIPCRTR", 42, 2, 0), ("AF_KEY", 15, 3, 2)):
    # A family that this kernel was built without answers EAFNOSUPPORT: nothing to attack, but the filter must say EPERM.
    fd = libc.syscall(told["calls"]["socket"], family, kind, protocol)
    number = ctypes.get_errno() if fd < 0 else 0
    if fd >= 0:
        os.close(fd)
    say("refused" if number == errno.EPERM and not told["unconfined"] else "did", f"ask for {label}", number)
"""
_PAIRS = """
attempt("datagram pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM))
attempt("packet pair", lambda: socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET))
pair = socket.socketpair()
attempt("send an urgent byte", lambda: pair[0].send(b"x", socket.MSG_OOB))
reach("connect a pair's end elsewhere", "connect", pair[0].fileno(), b"\\1\\0\\0battery", 10)
reach("bind a pair's end", "bind", pair[0].fileno(), b"\\1\\0\\0battery%d" % os.getpid(), 15)
reach("listen on a pair's end", "listen", pair[0].fileno(), 1)
reach("accept on a pair's end", "accept", pair[0].fileno(), 0, 0)
"""
_PASSING = """
# Descriptors in flight count for the kernel's user, not for the run, and a ring of them outlives its processes.
left, right = socket.socketpair()
attempt("pass a descriptor", lambda: socket.send_fds(left, [b"x"], [1]))
attempt("pass several messages at once", lambda: call("sendmmsg", left.fileno(), ctypes.create_string_buffer(64), 1, 0))
attempt("claim to be another process", lambda: left.sendmsg([b"x"],
    [(socket.SOL_SOCKET, 2, struct.pack("iii", os.getpid() if told["unconfined"] else 1, 0, 0))]))
def ring():
    for end in (left, right):
        socket.send_fds(end, [b"x"], [1, 2, left.fileno(), right.fileno()])
attempt("leave descriptors that hold each other", ring)
"""
_NAMES = """
def look_up():
    libc.gethostbyname.restype = ctypes.c_void_p
    try:
        return socket.getaddrinfo("localhost.localdomain.invalid", 80)
    except socket.gaierror as error:
        if not told["unconfined"]:
            raise
        return error  # the control got as far as asking
attempt("ask for a host name", look_up)
def metadata():
    with socket.socket(socket.AF_INET) as sock:
        sock.setblocking(False)
        return sock.connect_ex(("169.254.169.254", 80))
attempt("open a connection to the metadata service", metadata)
"""
_URING = """
params = (ctypes.c_uint32 * 30)()
reach("set up a ring", "io_uring_setup", 4, params)
reach("enter a ring", "io_uring_enter", 0, 0, 0, 0, 0, 0)
reach("register a ring", "io_uring_register", 0, 0, 0, 0)
reach("old asynchronous calls", "io_setup", 1, ctypes.byref(ctypes.c_ulong(0)))
"""
_OUTWARD = """
import urllib.request, subprocess
for label, act in (
    ("fetch a page", lambda: urllib.request.urlopen("http://1.1.1.1/", timeout=2)),
    ("start pip", lambda: subprocess.run([sys.executable, "-m", "pip", "download", "--timeout", "1", "--retries", "0",
        "--no-cache-dir", "retool-battery-none"], check=True, capture_output=True, timeout=20)),
):
    attempt(label, act)
"""
_PIPES = """
left, right = os.pipe()
for name in ("splice", "tee", "vmsplice"):
    reach(f"{name} pages", name, left, 0, right, 0, 1, 2)
"""

ATTACKS = (
    Attack("connect and send", "#36", _CONNECT),
    Attack("unix sockets", "#40", _UNIX),
    Attack("every socket family", "#39", _FAMILIES),
    Attack("socket pairs", "own", _PAIRS),
    Attack("passing descriptors", "own", _PASSING),
    Attack("names and metadata service", "#37 #38", _NAMES),
    Attack("asynchronous rings", "#44", _URING),
    Attack("page tricks with pipes", "own", _PIPES),
    Attack(
        "reach out with ordinary tools",
        "#36 #53",
        _OUTWARD,
        control=Control.NONE,
        why="would leave this machine; `connect and send` has the control",
    ),
)
