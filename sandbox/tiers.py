"""Tiers of isolation, strongest first, and their parts. Which one a machine gets is decided by attacking it."""

from __future__ import annotations

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


NS = Tier(
    "ns",
    namespaces=True,
    needs="user namespaces (Linux 5.14 or newer; on Ubuntu: sysctl kernel.apparmor_restrict_unprivileged_userns=0)",
)
UID = Tier(
    "uid",
    own_uid=True,
    landlock=True,
    needs="root with SETUID, SETGID and KILL (in Docker: run as root), Landlock (Linux 5.13) and an "
    "interpreter that other users can read",
)
SELF = Tier("self", landlock=True, deny_fork=True, needs="Landlock with signal scoping (Linux 6.12)")
NONE = Tier("none", seccomp=False, needs="allow_unconfined=True: no isolation at all")

TIERS = (NS, UID, SELF)
"""Candidates, strongest first. `none` is never a candidate: it has to be asked for."""
BY_NAME = {tier.name: tier for tier in (*TIERS, NONE)}
