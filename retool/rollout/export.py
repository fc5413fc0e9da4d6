"""The rollout log as one Parquet file, for notebooks and other people's tools."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from retool.records import Trajectory
from retool.rollout.codec_rows import call_record, dump_json
from retool.rollout.log import RolloutLog


def export_parquet(log: RolloutLog, path: Path | str) -> int:
    """One row a trajectory (tokens, masks, texts, reward) as a Parquet file; gives back the number of rows."""
    count = 0
    schema = pa.schema(
        [
            *((n, pa.string()) for n in ("id", "group", "problem_id", "family", "prompt", "answer", "status")),
            ("step", pa.int64()),
            ("index", pa.int64()),
            *((n, pa.float64()) for n in ("accuracy", "score", "seconds")),
            ("policy_text", pa.string()),
            ("flags", pa.list_(pa.string())),
            ("tool_calls", pa.string()),
            ("ids", pa.list_(pa.int32())),
            ("action_mask", pa.list_(pa.int8())),
            ("logprobs", pa.list_(pa.float64())),
            ("turns", pa.list_(pa.int32())),
        ]
    )
    with pq.ParquetWriter(str(path), schema) as writer:
        for step in log.steps():
            table = [_parquet_row(t, step) for g in log.read_step(step) for t in g.trajectories]
            count += len(table)
            writer.write_table(pa.Table.from_pylist(table, schema=schema))
    return count


def _parquet_row(t: Trajectory, step: int) -> dict[str, Any]:
    known = t.reward
    calls = [json.loads(call_record(c)) for c in t.tool_calls]
    text = {"prompt": t.problem.prompt, "answer": t.problem.answer, "policy_text": t.policy_text}
    return {
        "id": t.id,
        "group": t.group,
        "problem_id": t.problem.id,
        "family": t.problem.family,
        **{k: v.encode("utf-8", "replace").decode() for k, v in text.items()},
        "status": t.status,
        "step": step,
        "index": t.index,
        "accuracy": known.accuracy if known else None,
        "score": known.score if known else None,
        "seconds": t.seconds,
        "flags": list(t.flags),
        "tool_calls": dump_json(calls),
        "ids": t.transcript.ids,
        "action_mask": t.transcript.action_mask,
        "logprobs": t.transcript.logprobs,
        "turns": t.transcript.turns,
    }
