"""The rollout log gives back what was written, or says exactly what is wrong."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from retool.records import Group, Problem, RewardResult, ToolCall, Trajectory
from retool.rollout.log import RolloutLog, RolloutLogError
from retool.transcript import Span, Transcript, digest_tokens

TEXT = st.text(st.characters(codec=None), max_size=12)  # lone surrogates and NUL included
FLOAT = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def spans(draw: st.DrawFn) -> Transcript:
    made = [Span("prompt", tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=5))))]
    for turn in range(draw(st.integers(0, 3))):
        ids = tuple(draw(st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=6)))
        logprobs = tuple(draw(st.lists(st.floats(-1e3, 0), min_size=len(ids), max_size=len(ids))))
        versions = ((0, draw(st.integers(0, 9))), *([(1, 10)] if len(ids) > 1 and draw(st.booleans()) else []))
        code = draw(st.sampled_from([None, (0, len(ids)), (len(ids), len(ids))]))
        made.append(Span("policy", ids, turn, "text", logprobs, versions, code, digest_tokens(ids, logprobs)))
        made.append(Span(draw(st.sampled_from(["tool", "forced"])), ids[:2], turn, "observation"))
    return Transcript(made)


@st.composite
def groups(draw: st.DrawFn) -> Group:
    meta = draw(st.dictionaries(TEXT, st.none() | st.integers() | TEXT | st.lists(FLOAT, max_size=2), max_size=2))
    problem = Problem(draw(TEXT), draw(TEXT), draw(TEXT), draw(TEXT), draw(TEXT), meta)
    members = []
    for i in range(draw(st.integers(1, 3))):
        calls = [
            ToolCall(n, draw(TEXT), draw(st.sampled_from(["ok", "error"])), draw(TEXT), draw(FLOAT), 0.5, draw(TEXT))
            for n in range(draw(st.integers(0, 2)))
        ]
        reward = RewardResult(draw(st.none() | FLOAT), draw(FLOAT), {"a": draw(FLOAT)}, (draw(TEXT),), "v", draw(TEXT))
        members.append(
            Trajectory(
                f"4.2.{i}",
                problem,
                "4.2",
                i,
                draw(st.integers(0, 2**63 - 1)),
                draw(spans()),
                draw(st.sampled_from(["finished", "aborted", "truncated_tool"])),
                calls,
                draw(st.sampled_from([None, reward])),
                (draw(TEXT),),
                draw(TEXT),
                draw(FLOAT),
                draw(TEXT),
            )
        )
    return Group("4.2", 4, problem, members)


def same(a: Group, b: Group) -> bool:
    """Equality, transcripts compared by their spans."""
    pairs = zip(a.trajectories, b.trajectories, strict=True)
    return (
        (a.id, a.step, a.problem) == (b.id, b.step, b.problem)
        and all(x.transcript.spans == y.transcript.spans for x, y in pairs)
        and [dict(vars(t), transcript=0) for t in a.trajectories]
        == [dict(vars(t), transcript=0) for t in b.trajectories]
    )


def simple(step: int, g: int, members: int = 3, tokens: int = 5) -> Group:
    problem = Problem(f"p{g}", "2+2?", "4")
    made = []
    for i in range(members):
        ids = tuple((step * 1000 + g * 10 + i + k) % 97 for k in range(tokens))
        logprobs = (-0.5,) * tokens
        policy = Span("policy", ids, 0, "text", logprobs, ((0, step),), None, digest_tokens(ids, logprobs))
        transcript = Transcript([Span("prompt", (1, 2, 3)), policy])
        reward = RewardResult(float(i % 2), float(i % 2))
        call = ToolCall(0, "print(4)", "ok", "4")
        made.append(
            Trajectory(f"{step}.{g}.{i}", problem, f"{step}.{g}", i, i, transcript, tool_calls=[call], reward=reward)
        )
    return Group(f"{step}.{g}", step, problem, made)


@given(groups())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, group: Group) -> None:
    folder = tmp_path_factory.mktemp("log")
    with RolloutLog(folder) as log:
        log.append(group)
    with RolloutLog(folder, read_only=True) as log:
        (found,) = log.read_step(4)
    assert same(found, group)


def test_order_iteration_and_queries(tmp_path: Path) -> None:
    with RolloutLog(tmp_path) as log:
        for g in (10, 9, 0):
            log.append(simple(1, g))
        log.append_all([simple(0, g) for g in range(2)])
        assert log.steps() == [0, 1] and log.group_ids(1) == ["1.0", "1.9", "1.10"]
        assert [g.id for g in log] == ["0.0", "0.1", "1.0", "1.9", "1.10"]
        with RolloutLog(tmp_path, read_only=True) as reader:
            rows = reader.query("SELECT COUNT(*) n, SUM(actions) a FROM trajectories WHERE step = ?", (1,))
            assert rows == [{"n": 9, "a": 45}]
            with pytest.raises(RolloutLogError, match="not open for writing"):
                reader.append(simple(2, 0))
        with pytest.raises(RolloutLogError, match=r"1\.9 of step 1 is already in the log"):
            log.append(simple(1, 9))
        assert same(log.read_group("1.9"), simple(1, 9))
        with pytest.raises(RolloutLogError, match=r"no group '7\.7'"):
            log.read_group("7.7")


def test_a_group_is_committed_whole_or_not_at_all(tmp_path: Path) -> None:
    bad = simple(0, 1)
    bad.trajectories[2].problem = Problem("other", "", "")
    with RolloutLog(tmp_path) as log:
        log.append(simple(0, 0))
        with pytest.raises(ValueError, match="does not belong"):
            log.append_all([simple(0, 2), bad])
        assert log.group_ids(0) == ["0.0"]
        log.append(simple(0, 3))
        assert [same(g, simple(0, int(g.id[2:]))) for g in log.read_step(0)] == [True, True]


def test_dropping_a_step(tmp_path: Path) -> None:
    with RolloutLog(tmp_path) as log:
        log.append(simple(0, 0))
        log.append(simple(1, 0))
        log.drop_step(1)
        assert log.steps() == [0] and len(list((tmp_path / "shards").iterdir())) == 1
        assert log.query("SELECT COUNT(*) n FROM tool_calls")[0]["n"] == 3
        log.append(simple(1, 0, tokens=9))
        assert same(log.read_step(1)[0], simple(1, 0, tokens=9))


def test_damage_is_named(tmp_path: Path) -> None:
    with RolloutLog(tmp_path) as log:
        log.append(simple(3, 0))
        log.append(simple(3, 1))
    shard = tmp_path / "shards" / "step-000003.bin"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with RolloutLog(tmp_path, read_only=True) as log:
        assert same(log.read_group("3.0"), simple(3, 0))
        with pytest.raises(RolloutLogError, match=r"group 3\.1, trajectory 3\.1\.2: .*step-000003\.bin.*drop step 3"):
            log.read_step(3)
    shard.write_bytes(data[:40])
    with RolloutLog(tmp_path) as log, pytest.raises(RolloutLogError, match="cannot be written"):
        log.append(simple(3, 2))
    shard.unlink()
    with RolloutLog(tmp_path, read_only=True) as log, pytest.raises(RolloutLogError, match="No such file"):
        log.read_group("3.0")


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(RolloutLogError, match="no rollout log"):
        RolloutLog(tmp_path, read_only=True)
    (tmp_path / "index.sqlite").write_bytes(b"this is not a database" * 100)
    with pytest.raises(RolloutLogError, match="cannot be opened"):
        RolloutLog(tmp_path)
    with RolloutLog(tmp_path / "a") as log:
        log._db.execute("UPDATE meta SET value = '99'")
        log._db.commit()
    with pytest.raises(RolloutLogError, match="format 99"):
        RolloutLog(tmp_path / "a")


def test_parquet(tmp_path: Path) -> None:
    with RolloutLog(tmp_path) as log:
        for step in range(2):
            log.append(simple(step, 0))
        assert log.export_parquet(tmp_path / "out.parquet") == 6
    rows = pq.read_table(tmp_path / "out.parquet").to_pylist()
    t = simple(1, 0).trajectories[1]
    assert rows[4]["ids"] == t.transcript.ids and rows[4]["action_mask"] == t.transcript.action_mask
    assert (rows[4]["id"], rows[4]["accuracy"], rows[4]["step"]) == ("1.0.1", 1.0, 1)


# -- one writer, killed at any moment ---------------------------------------------------------------------------------

WRITER = """
import sys
from tests.rollout.test_rollout_log import simple
from retool.rollout.log import RolloutLog
log = RolloutLog(sys.argv[1])
done = {s: set(log.group_ids(s)) for s in log.steps()}
print("open", flush=True)
for step in range(400):
    for g in range(3):
        if f"{step}.{g}" not in done.get(step, ()):
            log.append(simple(step, g, tokens=400))
            print(f"{step}.{g}", flush=True)
"""


def writer(folder: Path) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    return subprocess.Popen(
        [sys.executable, "-c", WRITER, str(folder)], cwd=root, stdout=subprocess.PIPE, text=True, bufsize=1
    )


def test_kill_9_at_random_moments_loses_at_most_the_open_group(tmp_path: Path) -> None:
    rng = random.Random(4)
    acknowledged: list[str] = []
    for _ in range(4):
        child = writer(tmp_path)
        assert child.stdout is not None
        assert child.stdout.readline() == "open\n"  # a lock of a dead process is no obstacle
        for _ in range(rng.randrange(3, 20)):
            acknowledged.append(child.stdout.readline().strip())
        time.sleep(rng.random() * 0.01)
        os.kill(child.pid, signal.SIGKILL)
        acknowledged += child.stdout.read().split()
        child.wait()
        child.stdout.close()
        with RolloutLog(tmp_path, read_only=True) as log:
            found = [g.id for g in log]
            assert set(acknowledged) <= set(found) and len(found) == len(set(found))
            assert len(found) <= len(acknowledged) + 4
            for group in log:
                assert same(group, simple(group.step, int(group.id.split(".")[1]), tokens=400))


def test_what_a_killed_writer_left_is_cut(tmp_path: Path) -> None:
    with RolloutLog(tmp_path) as log:
        log.append(simple(0, 0))
    shard = tmp_path / "shards" / "step-000000.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole + b"half a group")
    (tmp_path / "shards" / "step-000001.bin").write_bytes(b"a group nobody knows")
    with RolloutLog(tmp_path) as log:
        assert shard.read_bytes() == whole and len(list((tmp_path / "shards").iterdir())) == 1
        log.append(simple(0, 1))
        assert [g.id for g in log] == ["0.0", "0.1"]


def test_two_writers_are_one_too_many(tmp_path: Path) -> None:
    child = writer(tmp_path)
    assert child.stdout is not None
    assert child.stdout.readline() == "open\n"
    with pytest.raises(RolloutLogError, match=f"process {child.pid} is writing"):
        RolloutLog(tmp_path)
    with RolloutLog(tmp_path, read_only=True):
        pass
    child.kill()
    child.wait()
    child.stdout.close()
    RolloutLog(tmp_path).close()
