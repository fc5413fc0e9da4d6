"""The rollout log: every group ever collected, written once, read by learner, resume, compare and viewer.

    <folder>/index.sqlite        groups, trajectories, tool calls, rewards (WAL: readers never wait for the writer)
    <folder>/shards/step-*.bin   token ids and log-probs, append-only, one file a step
    <folder>/writer.lock         held by the one writer; the system frees it when that process dies

Bytes go to the shard first and are synced, then one transaction makes the whole group known. So a group exists whole
or not at all; what a killed writer left behind in a shard is unknown to the index and is cut off by the next one.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from retool.records import Group, RewardResult
from retool.rollout import codec_rows as rows

FORMAT = 1
_SCHEMA = """
CREATE TABLE IF NOT EXISTS meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS groups (
    id TEXT PRIMARY KEY, step INTEGER NOT NULL, problem_id TEXT NOT NULL, size INTEGER NOT NULL, problem TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS groups_step ON groups (step);
CREATE TABLE IF NOT EXISTS trajectories (
    id TEXT PRIMARY KEY, group_id TEXT NOT NULL REFERENCES groups (id), step INTEGER NOT NULL, idx INTEGER NOT NULL,
    status TEXT NOT NULL, tokens INTEGER NOT NULL, actions INTEGER NOT NULL, turns INTEGER NOT NULL,
    file TEXT NOT NULL, offset INTEGER NOT NULL, length INTEGER NOT NULL, checksum TEXT NOT NULL, record TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS trajectories_group ON trajectories (group_id, idx);
CREATE INDEX IF NOT EXISTS trajectories_step ON trajectories (step);
CREATE TABLE IF NOT EXISTS tool_calls (
    trajectory_id TEXT NOT NULL REFERENCES trajectories (id), n INTEGER NOT NULL, turn INTEGER NOT NULL,
    status TEXT NOT NULL, queue_ms REAL NOT NULL, run_ms REAL NOT NULL, record TEXT NOT NULL,
    PRIMARY KEY (trajectory_id, n));
CREATE TABLE IF NOT EXISTS rewards (
    trajectory_id TEXT PRIMARY KEY REFERENCES trajectories (id), accuracy REAL, score REAL NOT NULL,
    verifier TEXT NOT NULL, record TEXT NOT NULL);
"""


class RolloutLogError(Exception):
    """The log cannot be opened, written or trusted; the message names file and group and what to do."""


class RolloutLog:
    """`RolloutLog(folder)` is the writer, `RolloutLog(folder, read_only=True)` any number of readers.

    Raises `RolloutLogError` when another live process writes, or the folder holds something else.
    """

    def __init__(self, folder: Path | str, read_only: bool = False) -> None:
        self.folder = Path(folder)
        self.read_only = read_only
        self._lock: IO[str] | None = None
        index = self.folder / "index.sqlite"
        try:
            if read_only:
                if not index.exists():
                    raise RolloutLogError(f"there is no rollout log in {self.folder} (no index.sqlite)")
                self._db = sqlite3.connect(f"{index.resolve().as_uri()}?mode=ro", uri=True, timeout=30)
            else:
                (self.folder / "shards").mkdir(parents=True, exist_ok=True)
                self._lock = _take_lock(self.folder / "writer.lock")
                self._db = sqlite3.connect(index, timeout=30)
                self._db.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=NORMAL; {_SCHEMA}")
                with self._db:
                    self._db.execute("INSERT OR IGNORE INTO meta VALUES ('format', ?)", (str(FORMAT),))
            self._db.row_factory = sqlite3.Row
            found = self._db.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        except (OSError, sqlite3.Error) as error:
            self.close()
            raise RolloutLogError(f"the rollout log in {self.folder} cannot be opened: {error}") from error
        except RolloutLogError:
            self.close()
            raise
        if found is None or found[0] != str(FORMAT):
            self.close()
            raise RolloutLogError(f"{index} has format {found and found[0]}, this version reads {FORMAT}")
        if not read_only:
            self._cut_tails()

    def close(self) -> None:
        """Give up the lock; idempotent."""
        if hasattr(self, "_db"):
            self._db.close()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        self.close()

    # -- writing -----------------------------------------------------------------------------------------------------

    def append(self, group: Group) -> None:
        """Commit one group whole."""
        self.append_all([group])

    def append_all(self, groups: Iterable[Group]) -> None:
        """Commit groups of one step together: all of them or none."""
        groups = list(groups)
        if not groups:
            return
        self._writable()
        step = groups[0].step
        if any(g.step != step for g in groups):
            raise ValueError("groups of different steps cannot be committed together")
        name = _shard(step)
        offset = self._end(name)
        places: dict[str, tuple[int, int, str]] = {}
        payloads: list[bytes] = []
        for t in (t for g in groups for t in g.trajectories):
            payload = rows.pack(t.transcript)
            places[t.id] = (offset, len(payload), rows.checksum(payload))
            offset += len(payload)
            payloads.append(payload)
        try:
            self._write_shard(name, self._end(name), payloads)
            with self._db:
                for group in groups:
                    self._insert(group, name, places)
        except sqlite3.IntegrityError as error:
            ids = ", ".join(g.id for g in groups)
            raise RolloutLogError(f"group {ids} of step {step} is already in the log ({error})") from error
        except (OSError, sqlite3.Error) as error:
            raise RolloutLogError(f"step {step} cannot be written to {self.folder}: {error}") from error

    def regrade(self, trajectory_id: str, reward: RewardResult) -> None:
        """Replace (or give) the reward of one trajectory."""
        self._writable()
        with self._db:
            known = self._db.execute("SELECT 1 FROM trajectories WHERE id = ?", (trajectory_id,)).fetchone()
            if known is None:
                raise RolloutLogError(f"there is no trajectory {trajectory_id!r} in {self.folder}")
            self._insert_reward(trajectory_id, reward)

    def drop_step(self, step: int) -> None:
        """Forget everything of a step."""
        self._writable()
        with self._db:
            of_step = "SELECT id FROM trajectories WHERE step = ?"
            self._db.execute(f"DELETE FROM tool_calls WHERE trajectory_id IN ({of_step})", (step,))
            self._db.execute(f"DELETE FROM rewards WHERE trajectory_id IN ({of_step})", (step,))
            self._db.execute("DELETE FROM trajectories WHERE step = ?", (step,))
            self._db.execute("DELETE FROM groups WHERE step = ?", (step,))
        (self.folder / _shard(step)).unlink(missing_ok=True)

    # -- reading -----------------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Steps with at least one group, ascending."""
        return [r[0] for r in self._db.execute("SELECT DISTINCT step FROM groups ORDER BY step")]

    def group_ids(self, step: int) -> list[str]:
        """Committed groups of a step, in the order of their position in it."""
        found = [r[0] for r in self._db.execute("SELECT id FROM groups WHERE step = ?", (step,))]
        return sorted(found, key=_natural)

    def read_group(self, group_id: str) -> Group:
        """Raises `RolloutLogError` when it is unknown or its bytes are not what was written."""
        head = self._db.execute("SELECT * FROM groups WHERE id = ?", (group_id,)).fetchone()
        if head is None:
            raise RolloutLogError(f"there is no group {group_id!r} in {self.folder}")
        problem = rows.load_problem(head["problem"])
        group = Group(head["id"], head["step"], problem, [])
        query = "SELECT * FROM trajectories WHERE group_id = ? ORDER BY idx"
        for row in self._db.execute(query, (group_id,)).fetchall():
            calls = "SELECT record FROM tool_calls WHERE trajectory_id = ? ORDER BY n"
            reward = self._db.execute("SELECT record FROM rewards WHERE trajectory_id = ?", (row["id"],)).fetchone()
            group.trajectories.append(
                rows.load_trajectory(
                    dict(row),
                    problem,
                    self._payload(row),
                    [c[0] for c in self._db.execute(calls, (row["id"],))],
                    None if reward is None else reward[0],
                )
            )
        if len(group.trajectories) != head["size"]:
            raise RolloutLogError(f"group {group_id} has {len(group.trajectories)} of {head['size']} trajectories")
        return group

    def read_step(self, step: int) -> list[Group]:
        """All committed groups of a step, in order."""
        return [self.read_group(g) for g in self.group_ids(step)]

    def __iter__(self) -> Iterator[Group]:
        """Every group, step by step."""
        for step in self.steps():
            yield from self.read_step(step)

    def export_parquet(self, path: Path | str) -> int:
        """One row a trajectory; gives back how many."""
        from retool.rollout.export import export_parquet

        return export_parquet(self, path)

    def query(self, sql: str, parameters: tuple[Any, ...] = ()) -> list[dict[str, Any]]:
        """Rows of the index, for viewers; the tables are described at the top of this file."""
        return [dict(r) for r in self._db.execute(sql, parameters)]

    # -- within ------------------------------------------------------------------------------------------------------

    def _writable(self) -> None:
        if self.read_only or self._lock is None:
            raise RolloutLogError(f"the rollout log in {self.folder} is not open for writing")

    def _end(self, name: str) -> int:
        found = self._db.execute("SELECT MAX(offset + length) FROM trajectories WHERE file = ?", (name,)).fetchone()
        return int(found[0] or 0)

    def _write_shard(self, name: str, offset: int, payloads: list[bytes]) -> None:
        path = self.folder / name
        new = not path.exists()
        with path.open("ab") as shard:
            if shard.tell() < offset:
                raise OSError(f"{path} has {shard.tell()} bytes, the index knows of {offset}")
            shard.truncate(offset)  # what an interrupted commit left behind
            shard.write(b"".join(payloads))
            shard.flush()
            os.fsync(shard.fileno())
        if new:
            _sync_folder(path.parent)

    def _insert(self, group: Group, file: str, places: dict[str, tuple[int, int, str]]) -> None:
        execute = self._db.execute
        record = rows.problem_record(group.problem)
        execute(
            "INSERT INTO groups VALUES (?, ?, ?, ?, ?)",
            (group.id, group.step, rows.dump_json(group.problem.id), len(group.trajectories), record),
        )
        for t in group.trajectories:
            if t.group != group.id or t.problem != group.problem:
                raise ValueError(f"trajectory {t.id} does not belong to group {group.id}")
            turns = len(t.transcript.policy_spans)
            sizes = (len(t.transcript), t.transcript.n_action, turns)
            execute(
                "INSERT INTO trajectories VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (t.id, group.id, group.step, t.index, t.status, *sizes, file, *places[t.id], rows.trajectory_record(t)),
            )
            for n, call in enumerate(t.tool_calls):
                values = (t.id, n, call.turn, call.status, call.queue_ms, call.run_ms, rows.call_record(call))
                execute("INSERT INTO tool_calls VALUES (?, ?, ?, ?, ?, ?, ?)", values)
            if t.reward is not None:
                self._insert_reward(t.id, t.reward)

    def _insert_reward(self, trajectory_id: str, reward: RewardResult) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO rewards VALUES (?, ?, ?, ?, ?)",
            (trajectory_id, reward.accuracy, reward.score, reward.verifier, rows.reward_record(reward)),
        )

    def _payload(self, row: sqlite3.Row) -> bytes:
        path = self.folder / row["file"]
        where = f"group {row['group_id']}, trajectory {row['id']}: {path} at {row['offset']}"
        try:
            with path.open("rb") as shard:
                shard.seek(row["offset"])
                payload = shard.read(row["length"])
        except OSError as error:
            raise RolloutLogError(f"{where}: {error}; restore the file or drop step {row['step']}") from error
        if len(payload) != row["length"] or rows.checksum(payload) != row["checksum"]:
            raise RolloutLogError(f"{where} is not what was written; restore the file or drop step {row['step']}")
        return payload

    def _cut_tails(self) -> None:
        """Bytes that no committed group names are what a killed writer left: remove them."""
        for path in sorted((self.folder / "shards").glob("step-*.bin")):
            end = self._end(f"shards/{path.name}")
            if end == 0:
                path.unlink()
            elif path.stat().st_size > end:
                os.truncate(path, end)


def _take_lock(path: Path) -> IO[str]:
    handle = path.open("a+")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        handle.seek(0)
        holder = handle.read().strip() or "unknown"
        handle.close()
        raise RolloutLogError(
            f"process {holder} is writing the rollout log in {path.parent}; stop it or use another run folder"
        ) from error
    handle.truncate(0)
    handle.write(str(os.getpid()))
    handle.flush()
    return handle


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # some file systems cannot sync folders
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _shard(step: int) -> str:
    return f"shards/step-{step:06d}.bin"


def _natural(group_id: str) -> list[tuple[int, int, str]]:
    """`3.10` sorts behind `3.9`."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in group_id.split(".")]
