"""Two versions of this repository side by side: a process for each, which has that version's modules and is told by
lines when its turn is. What makes the machine slow or fast then does so to both.

A benchmark that uses this imports it where it compares, not above: in a worker `benchmarks` is the other version's."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def start(script: str, folder: Path, *options: str) -> subprocess.Popen[str]:
    """`script` (this version's, a path), with the modules of the checkout `folder`."""
    return subprocess.Popen(
        [sys.executable, str(Path(script).resolve()), *options],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )


def ask(worker: subprocess.Popen[str], word: str = "go") -> str:
    """Tell it something; what it says next. Ends the benchmark when it has nothing to say any more."""
    assert worker.stdin is not None and worker.stdout is not None
    print(word, file=worker.stdin, flush=True)
    line = worker.stdout.readline()
    if not line:
        raise SystemExit("a part of the benchmark has ended; its error is above")
    return line


def turns(rounds: int, measure: Callable[[int], Any]) -> Iterator[tuple[Any, Any]]:
    """Rows of the first and the second version, which begin in turn."""
    for number in range(rounds):
        order = (0, 1) if number % 2 else (1, 0)
        found = {index: measure(index) for index in order}
        yield found[0], found[1]


def parser(description: str | None) -> argparse.ArgumentParser:
    """With the arguments that all have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("folders", nargs="*", type=_checkout, help="two checkouts: before and after")
    made.add_argument("--output", type=Path, help="write the report as JSON")
    return made


def _checkout(text: str) -> Path:
    folder = Path(text).resolve()
    if not (folder / "sandbox" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{text} is no checkout of this repository")
    return folder


def pair(made: argparse.ArgumentParser, options: argparse.Namespace) -> tuple[Path, Path]:
    """The two folders. Exits with code 2 where there are not two."""
    if len(options.folders) != 2:
        made.error("name two checkouts: before and after")
    return options.folders[0], options.folders[1]
