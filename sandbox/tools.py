"""For the command line: run one program, and say what this machine can do."""

from __future__ import annotations

import asyncio
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sandbox.linux import landlock
from sandbox.linux.syscalls import SUPPORTED
from sandbox.local import LocalSandbox, survey
from sandbox.types import ExecResult, Limits


async def run_once(
    code: str,
    *,
    profile: str = "py-math",
    stdin: str = "",
    limits: Limits | None = None,
    seed: int = 0,
    tier: str | None = None,
    allow_unconfined: bool = False,
) -> ExecResult:
    """Open a sandbox, run `code`, close it. Raises `SandboxError` when this machine cannot."""
    async with LocalSandbox(profile, limits, workers=1, allow_unconfined=allow_unconfined, tier=tier) as box:
        return await box.exec(code, stdin=stdin, seed=seed)


@dataclass(frozen=True)
class Capability:
    """One row of `capability_table`. `fix` is empty where nothing is missing."""

    name: str
    available: bool
    detail: str
    fix: str = ""


def capability_table(profile: str = "py-bare") -> list[dict[str, Any]]:
    """Rows of name, available, detail, fix: the kernel's parts, then every tier, attacked for real (about a second).

    Not for use inside a running event loop. Raises `SandboxError` when the supervisor cannot start.
    """
    version = landlock.abi() if SUPPORTED else 0
    rows = [
        Capability("linux", platform.system() == "Linux", f"{platform.system()} {platform.release()}", ""),
        Capability(
            "processor", SUPPORTED, platform.machine(), "" if SUPPORTED else "x86_64 or aarch64 is needed to confine"
        ),
        Capability(
            "landlock",
            version > 0,
            f"ABI {version}" if version else "not offered by this kernel",
            "" if version else "Linux 5.13 or newer with landlock in the kernel parameter lsm=",
        ),
        Capability("user", True, f"uid {os.geteuid()}" + (" (root)" if os.geteuid() == 0 else "")),
        Capability("container", True, "yes" if _in_container() else "not detected"),
    ]
    for row in asyncio.run(survey(profile)):
        rows.append(
            Capability(
                f"tier {row['tier']}",
                row["holds"],
                row["reason"] or "attacked: holds",
                "" if row["holds"] else row["needs"],
            )
        )
    return [row.__dict__ for row in rows]


def _in_container() -> bool:
    return Path("/.dockerenv").exists() or Path("/run/.containerenv").exists()
