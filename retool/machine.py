"""What this machine has: processors, memory, disk, GPUs, Docker. Looks, and changes nothing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from retool.versions import Finding

GIB = 1 << 30
_LITTLE_DISK = 5 * GIB
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_COMPOSE = (1, 28)
"""The first version of Compose that knows profiles and device reservations."""


def memory() -> tuple[int, int]:
    """(bytes in all, bytes that are free), within this control group's limit; zeros where nobody tells."""
    try:
        rows = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines() if ":" in line)
        total, free = (int(rows[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return 0, 0
    for file in _CGROUP_LIMITS:
        try:
            limit = int(Path(file).read_text())
        except (OSError, ValueError):  # absent, or `max`
            continue
        if 0 < limit < total:
            return limit, min(free, limit)
    return total, free


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def hardware(folder: Path) -> list[Finding]:
    """Processors, memory, and the disk that holds `folder`."""
    total, free = memory()
    disk = shutil.disk_usage(folder).free
    low = disk < _LITTLE_DISK
    return [
        Finding("machine", "cores", str(cores())),
        Finding("machine", "memory", f"{free / GIB:.1f} GiB free of {total / GIB:.1f}" if total else "unknown"),
        Finding(
            "machine",
            "disk",
            f"{disk / GIB:.1f} GiB free",
            "missing" if low else "ok",
            "make room, or write runs elsewhere with out=FOLDER: checkpoints need several times the model's size"
            if low
            else "",
        ),
    ]


def gpus() -> list[Finding]:
    """What torch sees, and a GPU that it does not."""
    driver = _says("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader")
    try:
        import torch
    except ImportError:
        return [Finding("machine", "gpu", driver or "none (torch is missing)")]
    if torch.cuda.is_available():
        out = []
        for i in range(torch.cuda.device_count()):
            seen = torch.cuda.get_device_properties(i)
            out.append(Finding("machine", f"gpu {i}", f"{seen.name}, {seen.total_memory / GIB:.0f} GiB"))
        return out
    if driver:
        build = torch.version.cuda
        why = (
            "torch is built for the CPU"
            if build is None
            else f"torch is built for CUDA {build}, which the driver lacks"
        )
        fix = "pip install --force-reinstall torch"
        return [Finding("machine", "gpu", f"{driver.splitlines()[0]}, but {why}", "missing", fix)]
    return [Finding("machine", "gpu", "none: small models only")]


def docker() -> list[Finding]:
    """The engine and Compose: for `sandbox.kind=docker` and the stack of docker-compose.yml."""
    if shutil.which("docker") is None:
        return [Finding("docker", "engine", "no docker command", "missing", _install_docker())]
    engine = _says("docker", "version", "--format", "{{.Server.Version}}")
    out = [
        Finding("docker", "engine", engine)
        if engine and re.match(r"\d", engine)
        else Finding("docker", "engine", "does not answer", "missing", "systemctl start docker (or sudo dockerd)")
    ]
    return [
        *out,
        compose(_says("docker", "compose", "version", "--short"), _says("docker-compose", "version", "--short")),
    ]


def compose(v2: str, v1: str) -> Finding:
    """`v2`: what `docker compose` says of its version, `v1`: what `docker-compose` says; empty when it says nothing."""
    names = {"docker compose": v2, "docker-compose": v1}
    versions = {name: tuple(int(n) for n in re.findall(r"\d+", said)[:2]) for name, said in names.items() if said}
    good = [name for name, version in versions.items() if version >= _COMPOSE]
    if good:
        return Finding("docker", "compose", ", ".join(f"{names[name].lstrip('v')} ({name})" for name in good))
    found = ", ".join(f"{names[name]} ({name}), which knows no profiles" for name in versions) or "none"
    return Finding("docker", "compose", found, "missing", "apt install docker-compose-plugin (Debian: docker-compose)")


def _install_docker() -> str:
    return "apt install docker.io docker-compose" if sys.platform == "linux" else "install Docker Desktop"


def _says(*command: str) -> str:
    """What a command prints, or nothing when it fails or is not there."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
