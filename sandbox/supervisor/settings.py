"""What a supervisor is told at its start, as one JSON argument."""

from __future__ import annotations

import json
import os
import sys
import sysconfig
from dataclasses import asdict, dataclass, field
from pathlib import Path

from sandbox.types import Limits


@dataclass(frozen=True)
class Settings:
    """`workers`: runs at once. `tier`: a name, or empty for the strongest that holds. `module_paths`: folders that the
    profile's modules were found in. `work_root`: a private folder. `client_pid`: whose death ends the supervisor.
    `survey`: report on every tier and end. `max_sessions`, `max_snapshots`: open at once. `profile`: the default, or
    `auto`; `profiles`: those that are installed. `require`: properties that the tier must have.
    `cgroups`: use control groups where the machine has them."""

    profile: str = "py-math"
    workers: int = 2
    tier: str = ""
    allow_unconfined: bool = False
    limits: Limits = field(default_factory=Limits)
    queue: int = 100_000
    module_paths: tuple[str, ...] = ()
    work_root: str = ""
    client_pid: int = 0
    client_fd: int = -1
    survey: bool = False
    max_sessions: int = 512
    max_snapshots: int = 256
    profiles: tuple[str, ...] = ("py-bare",)
    require: tuple[str, ...] = ()
    cgroups: bool = True

    def to_json(self) -> str:
        """For the command line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        """Inverse of `to_json`."""
        values = json.loads(text)
        values["limits"] = Limits(**values["limits"])
        for name in ("module_paths", "profiles", "require"):
            values[name] = tuple(values[name])
        return cls(**values)

    @property
    def tmp_mb(self) -> int:
        """MiB that all files of one run may take together (tier `ns`)."""
        return max(64, 4 * self.limits.file_mb)

    def python_paths(self) -> tuple[str, ...]:
        """Folders the interpreter needs: its prefixes, its libraries, and where the profile's modules are."""
        paths = {sys.prefix, sys.base_prefix, sys.exec_prefix, *self.module_paths}
        paths |= {sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")}
        paths.add(str(Path(sys.executable).resolve().parent))
        existing = {os.path.realpath(path) for path in paths if Path(path).is_dir()} | {
            path for path in paths if Path(path).is_dir()
        }
        kept: list[str] = []
        for path in sorted(existing - {"/"}):
            if not any(path.startswith(other.rstrip("/") + "/") for other in kept):
                kept.append(path)
        return tuple(kept)


CLEAN_ENVIRONMENT = {
    "PATH": "/usr/local/bin:/usr/bin:/bin",
    "LANG": "C.UTF-8",
    "LC_ALL": "C.UTF-8",
    "TZ": "UTC",
    "PYTHONHASHSEED": "0",
    "PYTHONDONTWRITEBYTECODE": "1",
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "BLIS_NUM_THREADS": "1",
    "VECLIB_MAXIMUM_THREADS": "1",
    "NUMEXPR_NUM_THREADS": "1",
}
"""The whole environment of the supervisor, the warm unit, and so of user code."""
