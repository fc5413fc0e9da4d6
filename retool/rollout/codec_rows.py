"""Trajectories as rows: a JSON record for everything small, raw bytes for token ids and log-probs."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import numpy as np

from retool.records import Problem, RewardResult, ToolCall, Trajectory
from retool.transcript import Span, Transcript

_ID = np.dtype("<i4")
_LOGPROB = np.dtype("<f8")


def checksum(payload: bytes) -> str:
    """Hash of a trajectory's bytes in the shard."""
    return hashlib.blake2b(payload, digest_size=16).hexdigest()


def dump_json(value: Any) -> str:
    """Compact JSON in plain ASCII, so that every string survives, lone surrogates included."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"))


def problem_record(problem: Problem) -> str:
    return dump_json(dataclasses.asdict(problem))


def load_problem(text: str) -> Problem:
    return Problem(**json.loads(text))


def pack(transcript: Transcript) -> bytes:
    """All ids as int32, then the log-probs of the policy spans as float64, little endian."""
    ids = np.asarray(transcript.ids, dtype=np.int64)
    if ids.size and (ids.min() < 0 or ids.max() > np.iinfo(_ID).max):
        raise ValueError(f"token ids {ids.min()}..{ids.max()} do not fit into 31 bits")
    logprobs = [x for s in transcript.policy_spans for x in s.logprobs or ()]
    return ids.astype(_ID).tobytes() + np.asarray(logprobs, dtype=_LOGPROB).tobytes()


def unpack(payload: bytes, spans: list[dict[str, Any]]) -> Transcript:
    """Inverse of `pack`, with the spans' records from the index. Raises `ValueError` when sizes disagree."""
    total = sum(s["n"] for s in spans)
    sampled = sum(s["n"] for s in spans if s["origin"] == "policy")
    if len(payload) != total * _ID.itemsize + sampled * _LOGPROB.itemsize:
        raise ValueError(f"{len(payload)} bytes do not hold {total} ids and {sampled} log-probs")
    ids = np.frombuffer(payload, _ID, total).tolist()
    logprobs = np.frombuffer(payload, _LOGPROB, sampled, total * _ID.itemsize).tolist()
    transcript = Transcript()
    at = at_logprob = 0
    for s in spans:
        n, policy = s["n"], s["origin"] == "policy"
        transcript.append(
            Span(
                s["origin"],
                tuple(ids[at : at + n]),
                turn=s["turn"],
                kind=s["kind"],
                logprobs=tuple(logprobs[at_logprob : at_logprob + n]) if policy else None,
                versions=tuple((o, v) for o, v in s.get("versions", ())),
                code=tuple(s["code"]) if s.get("code") is not None else None,
                digest=s.get("digest", ""),
            )
        )
        at += n
        at_logprob += n if policy else 0
    return transcript


def trajectory_record(t: Trajectory) -> str:
    """Everything but problem, group, index, tokens, tool calls and reward, which have their own places."""
    spans: list[dict[str, Any]] = []
    for s in t.transcript.spans:
        row: dict[str, Any] = {"origin": s.origin, "turn": s.turn, "kind": s.kind, "n": len(s)}
        if s.versions:
            row["versions"] = s.versions
        if s.code is not None:
            row["code"] = s.code
        if s.digest:
            row["digest"] = s.digest
        spans.append(row)
    return dump_json(
        {
            "seed": t.seed,
            "flags": t.flags,
            "policy_text": t.policy_text,
            "seconds": t.seconds,
            "error": t.error,
            "spans": spans,
        }
    )


def load_trajectory(
    row: dict[str, Any], problem: Problem, payload: bytes, calls: list[str], reward: str | None
) -> Trajectory:
    """`row`: id, group_id, idx, status, record of the index."""
    record = json.loads(row["record"])
    return Trajectory(
        id=row["id"],
        problem=problem,
        group=row["group_id"],
        index=row["idx"],
        seed=record["seed"],
        transcript=unpack(payload, record["spans"]),
        status=row["status"],
        tool_calls=[ToolCall(**json.loads(c)) for c in calls],
        reward=None if reward is None else load_reward(reward),
        flags=tuple(record["flags"]),
        policy_text=record["policy_text"],
        seconds=record["seconds"],
        error=record["error"],
    )


def call_record(call: ToolCall) -> str:
    return dump_json(dataclasses.asdict(call))


def reward_record(reward: RewardResult) -> str:
    return dump_json(dataclasses.asdict(reward))


def load_reward(text: str) -> RewardResult:
    raw = json.loads(text)
    raw["flags"] = tuple(raw["flags"])
    raw["turn_rewards"] = tuple(raw.get("turn_rewards", ()))
    return RewardResult(**raw)
