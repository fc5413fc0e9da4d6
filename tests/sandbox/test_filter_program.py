"""The compiled filter, run instruction by instruction: every call number gets the verdict that it is meant to get."""

from __future__ import annotations

import struct

import pytest

from sandbox.linux import seccomp
from sandbox.linux.numbers import ALLOWED, SPECIAL

ARCHITECTURE = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
ALLOW, KILL, EPERM, ENOSYS, ENOTSUP = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026, 0x0005005F
PID = 777
WORD = 2**32
FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 36, 37, 38, 1030, 1032, 1033, 1034)
"""Commands of fcntl that are allowed: duplicates, flags, locks, the size of a pipe, seals of memory files."""


def verdict(program: bytes, machine: str, number: int, *arguments: int) -> int:
    """Classic BPF as the kernel runs it, for the instructions that we use."""
    values = [argument % 2**64 for argument in (*arguments, 0, 0, 0, 0, 0, 0)[:6]]
    data = struct.pack("=IIQ6Q", number, ARCHITECTURE[machine], 0, *values)
    steps = list(struct.iter_unpack("=HBBI", program))
    word = at = 0
    while True:
        code, yes, no, k = steps[at]
        at += 1
        match code:
            case 0x20:
                (word,) = struct.unpack_from("=I", data, k)
            case 0x54:
                word &= k
            case 0x05:
                at += k
            case 0x06:
                return int(k)
            case _:
                true = {0x15: word == k, 0x35: word >= k, 0x45: bool(word & k)}[code]
                at += yes if true else no


@pytest.fixture(params=["x86_64", "aarch64"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(seccomp, "MACHINE", request.param)
    return str(request.param)


@pytest.mark.parametrize("deny_fork", [False, True])
@pytest.mark.parametrize("pidfds", [False, True])
def test_every_call_number_is_allowed_denied_or_unknown_as_listed(machine: str, deny_fork: bool, pidfds: bool) -> None:
    program = seccomp._compile(PID, deny_fork, pidfds)
    refused = {*seccomp._FORK_CALLS, *seccomp._CHANGE_CALLS} if deny_fork else set()
    allowed = {number for name, number in ALLOWED[machine].items() if name not in refused}
    for number in range(1000):
        if number in SPECIAL[machine].values():
            continue
        expected = ALLOW if number in allowed else EPERM if number <= 450 else ENOSYS
        assert verdict(program, machine, number) == expected, number
    # x86_64 has a second set of numbers, 2**30 and up, which is never ours.
    assert verdict(program, machine, 2**30 + 1) == (KILL if machine == "x86_64" else ENOSYS)
    assert verdict(program, machine, WORD - 1) == (KILL if machine == "x86_64" else ENOSYS)


def test_another_processor_s_calls_end_the_process(machine: str) -> None:
    program = seccomp._compile(PID, False, True)
    other = {"x86_64": "aarch64", "aarch64": "x86_64"}[machine]
    assert verdict(program, other, 1) == KILL


def test_calls_are_judged_by_their_arguments(machine: str) -> None:
    special = SPECIAL[machine]
    cases = [
        *(("clock_gettime", (clock,), ALLOW) for clock in (0, 1, 11, -6, -2, (~PID << 3) | 6)),  # -6, -2: our own
        *(("clock_nanosleep", (clock,), EPERM) for clock in ((~PID << 3) | 2, (~1 << 3) | 2, ~1 << 3, (~5 << 3) | 3)),
        ("clone", (0x11,), ALLOW),
        ("clone", (0x10000000 | 0x11,), EPERM),  # a user namespace
        ("clone", (0x100,), ALLOW),  # shared memory and no signal at the end: an anchor
        ("clone", (9,), EPERM),  # SIGKILL for the parent
        ("clone", (0x8000 | 15,), EPERM),
        ("clone3", (), ENOSYS),
        ("io_uring_setup", (), ENOSYS),
        ("socketpair", (1, 1), ALLOW),
        ("socketpair", (1, 2), EPERM),
        ("socketpair", (2, 1), EPERM),
        ("sendto", (0, 0, 1, 0x4000), ALLOW),
        ("sendto", (0, 0, 1, 0x4001), EPERM),  # MSG_OOB
        ("kill", (PID, 15), ALLOW),
        ("kill", (PID, 9), EPERM),
        ("kill", (-PID, 9), EPERM),
        ("kill", (-1, 9), EPERM),
        ("kill", (-5, 9), ALLOW),
        ("tkill", (5, 9), EPERM),
        ("tgkill", (PID, PID, 9), EPERM),
        ("tgkill", (5, 5, 9), ALLOW),
        ("prctl", (1, 9), EPERM),  # PDEATHSIG
        ("prctl", (15,), ALLOW),
        ("ioctl", (0, 0x5412), EPERM),  # TIOCSTI
        ("ioctl", (0, 0x5401), ALLOW),
        ("ioctl", (0, 0xC040FF0B), EPERM),  # PIDFD_GET_INFO
        ("ioctl", (0, 0xFF01), EPERM),  # PIDFD_GET_CGROUP_NAMESPACE
        *(("fcntl", (0, command), ALLOW) for command in FCNTL),
        *(("fcntl", (0, command), EPERM) for command in range(1100) if command not in FCNTL),
        ("pidfd_open", (1,), ALLOW),
        *((name, (), ENOTSUP) for name in ("getxattr", "lgetxattr", "fgetxattr")),
        *((name, (), ENOTSUP) for name in ("listxattr", "llistxattr", "flistxattr")),
        ("prlimit64", (0,), ALLOW),
        ("prlimit64", (PID,), ALLOW),
        ("prlimit64", (PID + 1,), EPERM),
        ("sched_setaffinity", (1,), EPERM),
    ]
    program = seccomp._compile(PID, False, True)
    for name, arguments, expected in cases:
        assert verdict(program, machine, special[name], *arguments) == expected, (name, arguments)
    assert verdict(seccomp._compile(PID, False, False), machine, special["pidfd_open"], 1) == ENOSYS
    without_processes = seccomp._compile(PID, True, False)
    assert verdict(without_processes, machine, special["clone"], 0x11) == EPERM
    assert verdict(without_processes, machine, special["clone"], 0x10000) == ALLOW  # a thread
    assert verdict(without_processes, machine, special["clone"], 0x10000 | 9) == EPERM
