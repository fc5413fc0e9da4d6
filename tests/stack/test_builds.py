"""What the images are built from, without an engine: compose and the Dockerfiles say the same, and each COPY finds its
files in a checkout that has no wheels."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml

from tests.stack.engine import ROOT

SERVICES = ("sandbox", "trainer", "trainer-gpu", "vllm")


def built(service: str) -> tuple[dict[str, Any], str]:
    """Its `build` section, and the text of its Dockerfile."""
    section = yaml.safe_load((ROOT / "docker-compose.yml").read_text())["services"][service]["build"]
    return section, (ROOT / section["dockerfile"]).read_text()


def default(value: str) -> str:
    """What compose puts in for `${NAME-default}` where nobody set NAME."""
    return re.sub(r"\$\{\w+:?-(.*?)\}", r"\1", value)


@pytest.mark.parametrize("service", SERVICES)
def test_compose_has_the_dockerfiles_defaults_and_every_key_is_in_the_example(service: str) -> None:
    section, dockerfile = built(service)
    said = dict(re.findall(r"^ARG (\w+)=(.*)$", dockerfile, re.M))
    assert {"BASE", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"} <= set(section["args"])
    assert {name: default(value) for name, value in section["args"].items()} == {n: said[n] for n in section["args"]}
    assert default(section["network"]) == "default"
    example = (ROOT / ".env.example").read_text()
    for value in (*section["args"].values(), section["network"]):
        [name] = re.findall(r"\$\{(\w+)", value)
        assert re.search(rf"^#? ?{name}=", example, re.M), name


def test_the_sandbox_alone_is_built_as_in_the_stack() -> None:
    alone = yaml.safe_load((ROOT / "docker/sandbox.compose.yml").read_text())["services"]["sandbox"]["build"]
    assert {**alone, "context": "."} == built("sandbox")[0] and alone["context"] == ".."


@pytest.mark.parametrize("service", SERVICES)
def test_no_wheels_are_needed(service: str) -> None:
    """BuildKit is sent only what some COPY names: a folder that may be missing needs a file beside it that is not."""
    dockerfile = built(service)[1]
    copies = re.findall(r"^COPY (?!--from)(.+) \S+$", dockerfile, re.M)
    assert copies
    for sources in (line.split() for line in copies):
        found = [list(ROOT.glob(source.rstrip("/"))) for source in sources]
        for source, files in zip(sources, found, strict=True):
            beside = {file.parent for files in found for file in files if file.is_file()}
            assert files or (ROOT / source).parent in beside, f"{source} in COPY {' '.join(sources)}"
