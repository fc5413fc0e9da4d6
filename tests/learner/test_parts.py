"""The learner's parts: chunked head, layouts, batching, schedules, collation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from retool.learner.batches import micro_batches, mini_batches
from retool.learner.checkpoint import module_tensors
from retool.learner.collate import collate
from retool.learner.head import Head, HeadError, check_head
from retool.learner.layout import lay_out
from retool.learner.optimiser import lr_factor
from retool.learner.roles import critic_role, language_role, silence_dropout
from retool.objectives import Atom, Structure
from retool.records import TrainSample
from retool.transcript import Sample, Span, Transcript
from tests.learner.build_runs import model, policy_span, samples


@pytest.mark.parametrize("chunk", [1, 700, 1 << 24])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_chunked_head_is_the_plain_head(chunk: int, temperature: float) -> None:
    net = model()
    hidden = torch.randn(17, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    targets = torch.arange(17) * 5 % net.config.vocab_size
    logits = net.lm_head(hidden) / temperature
    plain = torch.log_softmax(logits, -1)
    expected = plain.gather(-1, targets[:, None])[:, 0]
    entropy = -(plain.exp() * plain).sum(-1)
    (expected.sum() + 0.3 * entropy.sum()).backward()
    grads = hidden.grad, net.lm_head.weight.grad
    hidden.grad, net.lm_head.weight.grad = None, None
    got, ent = Head(net, temperature, chunk)(hidden, targets, True, True)
    (got.sum() + 0.3 * ent.sum()).backward()
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(ent, entropy)
    torch.testing.assert_close(hidden.grad, grads[0])
    torch.testing.assert_close(net.lm_head.weight.grad, grads[1])


def test_entropy_is_detached_unless_a_term_wants_it() -> None:
    net = model()
    hidden = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    _, ent = Head(net, 1.0)(hidden, torch.tensor([1, 2, 3]), True, False)
    assert not ent.requires_grad
    logp, ent = Head(net, 1.0)(hidden[:0], torch.tensor([], dtype=torch.int64), True, True)
    assert logp.shape == ent.shape == (0,)


def test_a_model_with_other_logits_is_refused() -> None:
    net = model()
    check_head(net, Head(net, 1.0))
    original = net.forward

    def doubled(*args: object, **kwargs: object) -> object:
        out = original(*args, **kwargs)
        out.logits = out.logits * 2 + 5
        return out

    net.forward = doubled
    with pytest.raises(HeadError, match=r"head\.py"):
        check_head(net, Head(net, 1.0))


def test_log_probs_are_those_of_the_whole_model() -> None:
    net = model()
    rollout = collate(samples(), "sampled", torch.float64)
    inputs = lay_out(rollout.rows, rollout.starts, "padded", 0)
    role = language_role("policy", net, 0.8)
    with torch.no_grad():
        logp = role.logp(inputs, rollout.batch["action"]).need("logp")
        for row, (ids, start) in enumerate(zip(rollout.rows, rollout.starts)):
            full = torch.log_softmax(net(torch.from_numpy(ids)[None]).logits[0] / 0.8, -1)
            mine = logp[rollout.batch.offsets[row] : rollout.batch.offsets[row + 1]]
            for k, value in enumerate(mine):
                t = start + k
                action = rollout.batch["action"][rollout.batch.offsets[row] + k]
                expected = full[t - 1, ids[t]] if action else torch.zeros(())
                assert float(value) == pytest.approx(float(expected), abs=1e-10)


def test_values_are_of_the_state_before_the_token() -> None:
    """The value of the first token after a tool span is read at the span's last token."""
    net = model()
    role = critic_role(net)
    critic = role.module
    nn.init.normal_(critic.head.weight)
    spans = [Span("prompt", (5, 6)), policy_span([7, 8], [-1, -1], 0), Span("tool", (9, 10), 0, "observation")]
    transcript = Transcript([*spans, policy_span([11], [-1], 1)])
    rollout = collate([TrainSample("a", "g", Sample.whole(transcript))], "sampled", torch.float64)
    for layout in ("padded", "packed"):
        inputs = lay_out(rollout.rows, rollout.starts, layout, 0)
        with torch.no_grad():
            values = role.value(inputs, rollout.batch["action"])
            hidden = critic.backbone(torch.tensor([transcript.ids])).last_hidden_state[0]
            states = critic.head(hidden)[:, 0]
        assert values.value is not None
        torch.testing.assert_close(values.value, torch.stack([states[1], states[2], *states.new_zeros(2), states[5]]))
        torch.testing.assert_close(values.after, states[6:7])


def test_collation_of_origins() -> None:
    code = Span("policy", (7, 8, 9), 0, "text", (-1.0, -2.0, -3.0), ((0, 0),), (1, 3), "x")
    t = Transcript([Span("prompt", (5,)), code, Span("tool", (1, 2), 0, "observation"), Span("forced", (3,), 1)])
    shown = Transcript([Span("prompt", (5,)), Span("demo", (6,), 0), Span("demo", (7,), 0, "observation")])
    rows = [TrainSample("a", "g", Sample.whole(t)), TrainSample("b", "g", Sample.whole(shown))]
    for train_on, demo in (("sampled", [False, False]), ("demo", [True, False])):
        rollout = collate(rows, train_on, torch.float32)  # type: ignore[arg-type]
        first = rollout.ids.index("a")
        batch = rollout.batch.take([first, 1 - first])
        assert batch["action"].tolist() == [True, True, True, False, False, False, *demo]
        assert batch["logp_rollout"].tolist() == [-1, -2, -3, 0, 0, 0, 0, 0]
        assert batch["kind"].tolist() == [0, 1, 1, 2, 2, 0, 0, 2]
        assert batch["turn"].tolist() == [0, 0, 0, 0, 0, 1, 0, 0]
        assert rollout.rows[first].tolist() == [5, 7, 8, 9, 1, 2, 3]
    with pytest.raises(ValueError, match="same id"):
        collate([rows[0], rows[0]], "sampled", torch.float32)
    with pytest.raises(ValueError, match="no samples"):
        collate([], "sampled", torch.float32)


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=20),
    st.integers(1, 80),
    st.none() | st.integers(1, 5),
    st.sampled_from(["padded", "packed"]),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_micro_batches_hold_every_atom_once(
    lengths: list[int], budget: int, most: int | None, layout: str, pairs: bool
) -> None:
    atoms = [Atom((i,)) for i in range(len(lengths))]
    if pairs:
        lengths = [*lengths, *lengths]
        atoms = [Atom((i, i + len(lengths) // 2)) for i in range(len(lengths) // 2)]
    plan = micro_batches(atoms, lengths, layout, budget, most)  # type: ignore[arg-type]
    assert sorted(row for rows in plan for row in rows) == list(range(len(lengths)))
    width = 2 if pairs else 1
    for rows in plan:
        cost = len(rows) * max(lengths[r] for r in rows) if layout == "padded" else sum(lengths[r] for r in rows)
        assert cost <= budget or len(rows) == width
        assert most is None or len(rows) <= max(most, width)
        if pairs:
            assert {(r + len(lengths) // 2) % len(lengths) for r in rows} == set(rows)


def test_mini_batches_keep_groups_whole_and_ignore_position() -> None:
    batch = collate(samples(groups=7), "sampled", torch.float64).batch
    plan = mini_batches(batch, Structure("group"), 3, "seed")
    rows = [[r for atom in mini for r in atom.rows] for mini in plan]
    assert sorted(r for mini in rows for r in mini) == list(range(28))
    assert [len(r) for r in rows] == [8, 12, 8]
    for mini in rows:
        groups = batch["group"][mini].tolist()
        assert all(groups.count(g) == 4 for g in groups)
    turned = batch.take(list(reversed(range(28))))
    again = mini_batches(turned, Structure("group"), 3, "seed")
    keys = [sorted(batch["key"][m].tolist()) for m in rows]
    assert keys == [sorted(turned["key"][[r for a in m for r in a.rows]].tolist()) for m in again]
    assert mini_batches(batch, Structure("group"), 3, "other") != plan
    assert len(mini_batches(batch, Structure("group"), 100, "seed")) == 7
    assert mini_batches(batch.take([]), Structure(), 2, "seed") == []


def test_padding_ids_are_never_targets() -> None:
    rows = [np.array([5, 6, 7]), np.array([8, 9, 10, 11, 12])]
    padded = lay_out(rows, [2, 1], "padded", 99)
    packed = lay_out(rows, [2, 1], "packed", 99)
    assert padded.targets.tolist() == packed.targets.tolist() == [7, 9, 10, 11, 12]
    assert packed.position_ids is not None
    assert packed.position_ids.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert padded.ids.tolist() == [[5, 6, 7, 99, 99], [8, 9, 10, 11, 12]]
    assert padded.last.tolist() == [2, 9]


def test_schedules() -> None:
    assert [lr_factor(s, 4, 10, "constant") for s in (0, 3, 4, 99)] == [0.25, 1.0, 1.0, 1.0]
    assert [lr_factor(s, 0, 10, "linear") for s in (0, 5, 10, 12)] == [1.0, 0.5, 0.0, 0.0]
    assert [lr_factor(s, 2, 12, "cosine") for s in (2, 7, 12)] == pytest.approx([1.0, 0.5, 0.0])


def test_dropout_is_off_even_in_train_mode() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
    silence_dropout(net)
    x = torch.ones(1, 4)
    assert torch.equal(net.train()(x), net.train()(x))
    assert set(module_tensors(net)) == {"0.weight", "0.bias"}
