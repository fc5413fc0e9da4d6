"""Tiers of isolation, strongest first, and their parts. Which one a machine gets is decided by attacking it."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Tier:
    """One way to confine. `namespaces`: own root, processes, network. `own_uid`: a user id of its own per run.
    `landlock`: required (in `ns` it is added when the kernel has it)."""

    name: str
    namespaces: bool = False
    own_uid: bool = False
    landlock: bool = False
    seccomp: bool = True
    deny_fork: bool = False
    needs: str = ""
    properties: tuple[str, ...] = ()


PROPERTIES = {
    "files": "nothing outside can be read or written",
    "network": "no connection, no datagram, not even to this machine",
    "signals": "no process outside can be signalled",
    "environment": "no environment but its own can be read",
    "daemons": "nothing of a run outlives it",
    "kernel": "system calls are filtered by an allowlist",
    "separation": "each run has an identity of its own: user id or namespaces, so that runs cannot reach each other",
    "fork": "code may start processes, and live sessions can be copied",
    "private_root": "no file of the host is visible, metadata included; /proc shows the run's own processes only",
    "total_disk": "all files of a run together are limited",
    "total_memory": "the memory of all processes of a run together is limited",
}
"""What a tier can be required to protect; the first six are proven at every start, or the tier is not used."""

_BASE = ("files", "network", "signals", "environment", "daemons", "kernel")
_FIXES = {
    "total_memory": "control groups that this user may write to (root outside a container, or a delegated cgroup v2)",
    "separation": "tier ns or uid",
    "fork": "tier ns or uid",
    "private_root": "tier ns",
    "total_disk": "tier ns",
}


NS = Tier(
    "ns",
    namespaces=True,
    properties=(*_BASE, "separation", "fork", "private_root", "total_disk"),
    needs="user namespaces (Linux 5.14 or newer; on Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0)",
)
UID = Tier(
    "uid",
    own_uid=True,
    landlock=True,
    properties=(*_BASE, "separation", "fork"),
    needs="root with SETUID, SETGID and KILL (in Docker: run as root), Landlock (Linux 5.13) and an "
    "interpreter that other users can read",
)
SELF = Tier(
    "self",
    landlock=True,
    deny_fork=True,
    properties=_BASE,
    needs="Landlock with signal scoping (Linux 6.12)",
)
NONE = Tier("none", seccomp=False, needs="allow_unconfined=True: no isolation at all")

TIERS = (NS, UID, SELF)
"""Candidates, strongest first. `none` is never a candidate: it has to be asked for."""
BY_NAME = {tier.name: tier for tier in (*TIERS, NONE)}


def lacking(tier: Tier, require: Sequence[str], groups: bool) -> str:
    """Why a tier does not give what is required; empty when it does. `groups`: whether control groups can be used."""
    given = {*tier.properties, *(("total_memory",) if groups else ())}
    missing = [name for name in require if name not in given]
    if not missing:
        return ""
    fixes = "; ".join(dict.fromkeys(_FIXES.get(name, "a tier that isolates") for name in missing))
    return f"does not give {', '.join(missing)} (that takes {fixes})"


def unknown_properties(require: Sequence[str]) -> str:
    """What is wrong with a list of required properties, or nothing."""
    if isinstance(require, str) or not isinstance(require, Collection):
        return f"require is a list of properties, not {require!r:.100}"
    unknown = [name for name in require if name not in PROPERTIES]
    return f"unknown properties {', '.join(map(str, unknown))}: choose from {', '.join(PROPERTIES)}" if unknown else ""
