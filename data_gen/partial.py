"""What an unfinished generation has so far: a JSONL that only grows, tolerant of a torn last line."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO


class Partial:
    """`rows`: problem id → its row. A file of another recipe (fingerprint) is started anew. Raises `OSError`."""

    def __init__(self, path: Path, fingerprint: str) -> None:
        self._path = path
        self.rows: dict[str, dict[str, Any]] = {}
        self.accepted = 0
        self._file: TextIO = self._open(fingerprint)

    def _open(self, fingerprint: str) -> TextIO:
        head = {"fingerprint": fingerprint}
        lines = self._path.read_bytes().split(b"\n")[:-1] if self._path.exists() else []  # no newline: torn
        good: list[bytes] = []
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                break
            if not good and row != head:
                break
            if good:
                self._keep(row["problem"], row["row"])
            good.append(line)
        text = b"".join(line + b"\n" for line in good) or json.dumps(head).encode() + b"\n"
        temporary = self._path.with_name(f"{self._path.name}.tmp")
        temporary.write_bytes(text)
        temporary.replace(self._path)
        return self._path.open("a", encoding="utf-8")

    def _keep(self, problem: str, row: dict[str, Any]) -> None:
        self.rows[problem] = row
        self.accepted += "trace" in row

    def add(self, problem: str, row: dict[str, Any]) -> None:
        """One write a row: a killed process tears the last line at worst."""
        self._file.write(json.dumps({"problem": problem, "row": row}) + "\n")
        self._file.flush()
        self._keep(problem, row)

    def remove(self) -> None:
        self._file.close()
        self._path.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self._file.close()
