"""The folder that a run and its vLLM servers see at the same path (`engine.share`). Imports neither torch nor vLLM.

FOLDER/start.json     what servers begin with: {"folder": "start-...", "dtype": ..., "context": ..., "slots": ...}
FOLDER/start-*/       a whole model with its tokenizer, complete before start.json names it, never changed
FOLDER/weights-*/     the weights of one version, as long as it is the newest (vllm_engine.py)
FOLDER/lock           held by the run; it says `busy` when that run did not end by itself

A server started with `--share FOLDER` (vllm_keeper.py) begins anew whenever start.json changes.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from retool.errors import UserError
from retool.files import write_json

_NAME = re.compile(r"start-[0-9a-f]{12}-[0-9a-f]{8}")
_VOLATILE = ("_name_or_path", "transformers_version", "architectures", "dtype", "torch_dtype")
_WHERE_FROM = ("name_or_path", "is_local", "local_files_only", "_commit_hash")  # of a tokenizer


@dataclass(frozen=True)
class Start:
    """What a server begins with. `folder`: name within the share; `context`: tokens, `slots`: sequences."""

    folder: str
    dtype: str
    context: int
    slots: int

    @classmethod
    def read(cls, share: Path) -> Start | None:
        """What is asked for now; None where nothing is. Raises `UserError` for a file that no run wrote."""
        file = share / "start.json"
        try:
            made = cls(**json.loads(file.read_text(encoding="utf-8")))
            if _NAME.fullmatch(made.folder) and int(made.context) > 0 and int(made.slots) > 0:
                return made
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{file} cannot be read ({error}); delete it, the next run writes it anew") from None
        raise UserError(f"{file} is not what a run writes; delete it, the next run writes it anew")


def is_start(root: str) -> bool:
    """Whether a server at that model's path follows a share."""
    return _NAME.fullmatch(Path(root).name) is not None


class Share:
    """One run's hold on the folder, until `release` or the end of the process. Raises `UserError` when another run
    has it or it cannot be written to."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / "lock").open("a+", encoding="utf-8")
        except OSError as error:
            raise UserError(f"engine.share: cannot write to {folder}: {error.strerror or error}") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lock.close()
            raise UserError(
                f"engine.share: {folder} is in use by another run, and its servers hold that run's weights; "
                "wait for it, or give this run servers and a folder of its own"
            ) from None
        except OSError as error:
            self._lock.close()
            raise UserError(
                f"engine.share: {folder} knows no locks ({error.strerror}); use another file system"
            ) from None
        self._lock.seek(0)
        self.orphaned = self._lock.read() == "busy"
        """The last run was killed: its servers may be in the middle of anything."""
        self._write("busy")
        for left in (*self.folder.glob("weights-*"), *self.folder.glob(".start-*")):
            shutil.rmtree(left, ignore_errors=True)

    def begin(self, digest: str, save: Callable[[Path], None], *, dtype: str, context: int, slots: int) -> Start:
        """Ask servers to begin with a model, which `save` writes. One that they have already is left to them, unless
        the last run was killed."""
        old = self.now()
        made = Start(f"start-{digest}-{uuid.uuid4().hex[:8]}", dtype, context, slots)
        if old is not None and not self.orphaned and (self.folder / old.folder).is_dir():
            same = replace(made, folder=old.folder)
            if old == same and old.folder.startswith(f"start-{digest}-"):
                return old
        hidden = self.folder / f".{made.folder}"
        save(hidden)
        hidden.rename(self.folder / made.folder)
        write_json(self.folder / "start.json", asdict(made))
        return made

    def now(self) -> Start | None:
        """What servers are asked to begin with."""
        try:
            return Start.read(self.folder)
        except UserError:
            return None  # it is about to be written anew

    def sweep(self) -> None:
        """Delete what servers began with in earlier runs; to be called when they all have begun with the newest."""
        now = self.now()
        for folder in self.folder.glob("start-*"):
            if now is not None and folder.is_dir() and folder.name != now.folder:
                shutil.rmtree(folder, ignore_errors=True)

    def release(self) -> None:
        """End in order; idempotent."""
        if not self._lock.closed:
            self._write("")
            self._lock.close()

    def _write(self, word: str) -> None:
        self._lock.seek(0)
        self._lock.truncate()
        self._lock.write(word)
        self._lock.flush()


def digest_of(kind: str, config: dict[str, object], tokenizer: Path) -> str:
    """Names models between which weights can be exchanged: class, configuration, and the tokenizer's files."""
    known = {key: value for key, value in config.items() if key not in _VOLATILE}
    told = hashlib.sha256(json.dumps([kind, known], sort_keys=True, default=str).encode())
    for file in sorted(tokenizer.rglob("*")):
        if file.is_file():
            data = file.read_bytes()
            if file.name == "tokenizer_config.json":
                kept = {key: value for key, value in json.loads(data).items() if key not in _WHERE_FROM}
                data = json.dumps(kept, sort_keys=True).encode()
            told.update(file.relative_to(tokenizer).as_posix().encode() + b"\0")
            told.update(hashlib.sha256(data).digest())
    return told.hexdigest()[:12]
