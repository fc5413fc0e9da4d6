"""One rollout in, new weights out. Knows no algorithm: it calls the four scopes of an `Objective` in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from retool.config import Recipe
from retool.learner import persist
from retool.learner.batches import micro_batches, mini_batches, passes
from retool.learner.collate import Rollout, collate
from retool.learner.guard import LearnerStopped, compare_digests, not_finite, write_bundle
from retool.learner.layout import Inputs, lay_out
from retool.learner.metrics import Mean
from retool.learner.networks import make_networks, value_networks
from retool.learner.optimiser import lr_factor
from retool.learner.reference import MovingReference
from retool.learner.roles import Role
from retool.learner.world import World
from retool.objectives import Batch, Finalized, Forward, Objective, ObjectiveError, ObjectiveState
from retool.records import TrainSample


@dataclass(frozen=True)
class Micro:
    """One micro-batch: its rows in the mini-batch, its tensors, and whether this rank's copy counts."""

    rows: list[int]
    inputs: Inputs
    rollout: Rollout
    counts: bool


class Learner:
    """Policy, critic and reference, their optimisers, and the state of the objective."""

    def __init__(
        self,
        recipe: Recipe,
        objective: Objective,
        roles: dict[str, Role],
        tokenizer: Any,
        world: World,
        demos: Sequence[TrainSample] = (),
    ) -> None:
        self.recipe, self.objective, self.roles, self.tokenizer, self.world = recipe, objective, roles, tokenizer, world
        self.state: ObjectiveState = objective.initial_state()
        self.version = 0
        self.updates = 0
        param = next(self.policy.module.parameters())
        self.dtype = torch.float64 if param.dtype == torch.float64 else torch.float32
        self.pad_id = int(getattr(tokenizer, "pad_token_id", None) or 0)
        self.moving: MovingReference | None = None
        if objective.reference is not None and objective.reference.kind != "frozen":
            self.moving = MovingReference(objective.reference, self.policy, roles["reference"])
        self.demos = tuple(demos)
        if objective.aside is not None and not self.demos:
            raise ObjectiveError("objective.ptx needs demonstrations: give objective.ptx.data, a JSONL of traces")

    @classmethod
    def create(
        cls,
        recipe: Recipe,
        objective: Objective,
        model: Any,
        tokenizer: Any,
        *,
        world: World | None = None,
        demos: Sequence[TrainSample] = (),
    ) -> Learner:
        """Wraps `model` (trained in place, so an engine may share it) and makes the other networks it needs from it.

        `demos`: demonstrations for the objective's term beside the rollout. Sets torch's thread count when
        `learner.threads` or `deterministic` ask for it. Raises `HeadError` for a model whose logits the learner cannot
        reproduce, `CheckpointError` for a critic that cannot be loaded.
        """
        c = recipe.learner
        if c.threads is not None or recipe.deterministic:
            torch.set_num_threads(c.threads or 1)
        world = world or World()
        networks = make_networks(recipe, objective, model, world)
        learner = cls(recipe, objective, networks.roles, tokenizer, world, demos)
        learner.state = replace(learner.state, **networks.moments)
        return learner

    @classmethod
    def of_value_model(cls, recipe: Recipe, objective: Objective, model: Any, tokenizer: Any) -> Learner:
        """A learner whose only trained network is `model`'s backbone with a scalar head (a reward model)."""
        return cls(recipe, objective, value_networks(recipe, model), tokenizer, World())

    def phase(self, recipe: Recipe, objective: Objective) -> Learner:
        """A learner of its own, on the same networks, for a phase in which only the critic learns (and keeps what its
        optimiser gathered)."""
        roles = {"policy": replace(self.policy, optimiser=None), "critic": self.roles["critic"]}
        return type(self)(recipe, objective, roles, self.tokenizer, self.world)

    @property
    def policy(self) -> Role:
        return self.roles["policy"]

    def step(self, samples: list[TrainSample]) -> dict[str, float]:
        """Learns from one rollout: score, prepare, then all optimiser steps. Deterministic given inputs and state.

        Returns metrics. Raises `LearnerStopped` (with the folder of a repro bundle) when a reward or loss is not
        finite, or when a trained token is not the one that was sampled.
        """
        objective, metrics = self.objective, Mean()
        rollout = collate(samples, objective.train_on, self.dtype)
        if bad := not_finite({s.id: s.score for s in samples} | {f"{s.id} accuracy": s.accuracy for s in samples}):
            self._stop("non-finite-reward", f"the reward of {', '.join(bad[:5])} is not finite", rollout)
        batch, filtered = objective.filter(rollout.batch)
        rollout = rollout.following(batch, batch["index"].tolist())
        if len(rollout):
            self._verify(rollout, [self._whole(rollout)], Mean())  # before anything changes; again on what is trained
        rollout = self._score(rollout, metrics)
        batch, state, prepared = objective.prepare(rollout.batch, self.state)
        rollout = replace(rollout, batch=batch)
        metrics.set(filtered | prepared)
        metrics.set({"samples": float(len(rollout)), "action_tokens": float(batch["action"].sum())})
        c = self.recipe.learner
        done = 0
        for epoch in range(c.epochs):
            seed = (self.recipe.seed, self.version, epoch)
            for mini in mini_batches(rollout.batch, objective.structure, c.updates, seed):
                rows = [row for atom in mini for row in atom.rows]
                done += self._update(rollout.take(rows), metrics, first=done == 0, verify=epoch == 0)
        if self.moving is not None and done and not self._critic_only:
            self.moving.tick("rollout")
        self.state = state
        self.version += 1
        return metrics.result() | {"updates": float(done), "version": float(self.version)}

    @property
    def _critic_only(self) -> bool:
        """Whether this rollout belongs to the critic's warm-up."""
        return self.objective.critic is not None and self.version < self.objective.critic.warmup

    def measure(
        self, samples: list[TrainSample], extra: frozenset[str] = frozenset()
    ) -> tuple[Batch, dict[str, float]]:
        """A rollout scored (with `extra` score columns) and prepared but not learnt from, with the metrics of
        `prepare`; nothing changes."""
        rollout = self._score(collate(samples, self.objective.train_on, self.dtype), Mean(), extra)
        batch, _, metrics = self.objective.prepare(rollout.batch, self.state)
        return batch, metrics

    def _score(self, rollout: Rollout, metrics: Mean, extra: frozenset[str] = frozenset()) -> Rollout:
        """The columns that the objective reads and only a pass through the networks can give; on all ranks."""
        wanted = self.objective.scores | extra
        if not wanted or not len(rollout):
            return rollout
        batch = rollout.batch
        out = {name: torch.zeros(batch.n_tokens, dtype=self.dtype) for name in sorted(wanted - {"bootstrap"})}
        boot = torch.zeros(len(batch), dtype=self.dtype)
        with torch.no_grad():
            for micro in self._micros(rollout):
                tokens = batch.token_index(torch.tensor(micro.rows))
                scores = self._score_micro(micro, wanted)  # a sharded network needs all ranks, counted or not
                for name, values in scores.items() if micro.counts else ():
                    if name == "bootstrap":
                        boot[micro.rows] = values.to(boot)
                    else:
                        out[name][tokens] = values.to(out[name])
        self.world.sum_([*out.values(), boot])
        batch = batch.with_tokens(**out)
        if "bootstrap" in wanted:
            batch = batch.with_samples(bootstrap=boot)
        if "logp_old" in wanted and self.objective.train_on == "sampled":
            gap = torch.where(batch["action"], batch["logp_old"] - batch["logp_rollout"], 0.0)
            metrics.max({"max_logprob_gap": float(gap.abs().max()) if len(gap) else 0.0})
        return replace(rollout, batch=batch)

    def _score_micro(self, micro: Micro, wanted: frozenset[str]) -> dict[str, Tensor]:
        action = micro.rollout.batch["action"]
        out: dict[str, Tensor | None] = {}
        if wanted & {"logp_old", "entropy"}:
            role = self.policy
            now = role.logp(micro.inputs.to(role.device), action.to(role.device), entropy="entropy" in wanted)
            out |= {"logp_old": now.logp, "entropy": now.entropy}
        if "logp_ref" in wanted:
            role = self.roles["reference"]
            out["logp_ref"] = role.logp(micro.inputs.to(role.device), action.to(role.device)).logp
        if wanted & {"value", "bootstrap"}:
            role = self.roles["critic"]
            now = role.value(micro.inputs.to(role.device), action.to(role.device))
            out |= {"value": now.value, "bootstrap": now.after}
        return {name: value for name, value in out.items() if value is not None and name in wanted}

    def _micros(self, rollout: Rollout) -> list[Micro]:
        """This rank's micro-batches. All ranks get equally many: a rank without one repeats another with no weight."""
        c = self.recipe.learner
        atoms = self.objective.structure.atoms(rollout.batch)
        lengths = [len(r) for r in rollout.rows]
        plan = micro_batches(atoms, lengths, c.layout, c.micro_tokens, c.micro_samples)
        mine = [(rows, True) for rows in plan[self.world.rank :: self.world.size]]
        rounds = -(-len(plan) // self.world.size)
        mine += [(plan[0], False)] * (rounds - len(mine))
        out = []
        for rows, counts in mine:
            part = rollout.take(rows)
            out.append(Micro(rows, lay_out(part.rows, part.starts, c.layout, self.pad_id), part, counts))
        return out

    def _whole(self, rollout: Rollout) -> Micro:
        """The rollout as one packed micro-batch: for checks, never for a forward pass."""
        inputs = lay_out(rollout.rows, rollout.starts, "packed", self.pad_id)
        return Micro(list(range(len(rollout))), inputs, rollout, False)

    def _update(self, mini: Rollout, metrics: Mean, first: bool, verify: bool) -> int:
        """One optimiser step on one mini-batch; 0 when it holds nothing to learn from."""
        critic_only = self._critic_only
        now = self._current(mini) if self.objective.current else None
        final = self.objective.finalize(mini.batch, self.state, now, critic_only)
        if not any(d > 0 for d in final.denominators.values()):
            return 0
        micros = self._micros(replace(mini, batch=final.batch))
        if verify:
            self._verify(mini, micros, metrics)
        sums = Mean()
        for micro in micros:
            self._backward(self.objective, micro, final, sums, first)
        denominators = final.denominators | ({} if critic_only else self._aside(sums))
        losses = sums.reduce(self.world)
        self._report(losses, denominators, float(final.batch["action"].sum()), metrics)
        if bad := not_finite(losses):
            self._stop("non-finite-loss", f"{', '.join(bad)} is not finite", mini)
        factor = lr_factor(self.updates, self.recipe.learner.warmup_steps, self._total(), self.recipe.learner.schedule)
        metrics.set({"lr": self.recipe.learner.lr * factor})
        for name, role in self.roles.items():
            if role.optimiser is not None and not (critic_only and name == "policy"):
                norm = role.optimiser.step(factor, self.recipe.learner.grad_clip, self.world)
                if not_finite({"norm": norm}):
                    self._stop("non-finite-gradient", f"the gradient norm of the {name} is {norm}", mini)
                metrics.add({f"grad_norm/{name}": norm})
        self.updates += 1
        if self.moving is not None and not critic_only:
            self.moving.tick("update")
        return 1

    def _total(self) -> int:
        return self.recipe.steps * self.recipe.learner.updates * self.recipe.learner.epochs

    def _backward(self, objective: Objective, micro: Micro, final: Finalized, sums: Mean, first: bool) -> None:
        """Gradients of one micro-batch, policy and critic one after the other."""
        active = frozenset(final.denominators)
        for name in ("policy", "critic"):
            terms = [t for t in objective.terms if t.role == name and t.name in active]
            if not terms:
                continue
            role, names = self.roles[name], frozenset(t.name for t in terms)
            needs = frozenset().union(*(t.needs for t in terms))
            inputs, batch = micro.inputs.to(role.device), micro.rollout.batch.to(role.device)
            training = self.recipe.learner.activation_checkpointing
            role.module.train(training)
            if name == "policy":
                entropy = "entropy" in needs
                forward = role.logp(inputs, batch["action"], entropy or first, entropy)
            else:
                forward = role.value(inputs, batch["action"])
            numerators = objective.loss(batch, forward, names)
            total = sum((final.scale(n) * x for n, x in numerators.items()), start=self._zero(forward))
            (total if micro.counts else total * 0.0).backward()
            role.module.eval()
            if micro.counts:
                self._note(objective, batch, forward, numerators, sums, first and name == "policy")

    def _aside(self, sums: Mean) -> dict[str, float]:
        """Gradients of the term on demonstrations, added to those of the rollout; its denominator by name."""
        beside, aside = self.objective.beside, self.objective.aside
        if beside is None or aside is None:
            return {}
        picks = passes(len(self.demos), self.updates, aside.batch, f"ptx/{self.recipe.seed}")
        rows = [replace(self.demos[i], id=f"{epoch}/{self.demos[i].id}") for epoch, i in picks]
        rollout = collate(rows, beside.train_on, self.dtype)
        final = beside.finalize(rollout.batch, self.state)
        with self.policy.at_temperature(beside.temperature):
            for micro in self._micros(replace(rollout, batch=final.batch)):
                self._backward(beside, micro, final, sums, False)
        return final.denominators

    @staticmethod
    def _zero(forward: Forward) -> Tensor:
        """A zero that is connected to the network, so that backward works when no term has a token here."""
        connected = forward.logp if forward.logp is not None else forward.need("value")
        return connected.sum() * 0.0

    @staticmethod
    def _note(
        objective: Objective, batch: Batch, forward: Forward, numerators: dict[str, Tensor], sums: Mean, first: bool
    ) -> None:
        with torch.no_grad():
            sums.sum({f"loss/{n}": float(x.detach()) for n, x in numerators.items()})
            sums.sum({k: float(v) for k, v in objective.diagnostics(batch, forward, frozenset(numerators)).items()})
            if first and forward.entropy is not None:
                sums.sum({"entropy": float(forward.entropy.detach().sum())})
            if first and objective.train_on == "sampled":
                gap = torch.where(batch["action"], forward.need("logp").detach() - batch["logp_rollout"], 0.0)
                sums.max({"max_logprob_gap": float(gap.abs().max()) if len(gap) else 0.0})

    @staticmethod
    def _report(losses: dict[str, float], denominators: dict[str, float], tokens: float, metrics: Mean) -> None:
        """Sums of one update as means: losses by their own denominators, the rest per action token."""
        for name, value in losses.items():
            if name.startswith("loss/"):
                denominator = denominators[name.removeprefix("loss/")]
                metrics.add({name: value / denominator if denominator > 0 else 0.0})
            elif name == "max_logprob_gap":
                metrics.max({name: value})
            else:
                metrics.add({name: value / max(1.0, tokens)})

    def _current(self, mini: Rollout) -> Forward:
        """What the objective asks to know of a mini-batch under the weights as they are now, without gradient; on all
        ranks."""
        entropy = "entropy" in self.objective.current
        out = {name: torch.zeros(mini.batch.n_tokens, dtype=self.dtype) for name in ("logp", *["entropy"] * entropy)}
        with torch.no_grad():
            for micro in self._micros(mini):
                role = self.policy
                now = role.logp(micro.inputs.to(role.device), micro.rollout.batch["action"].to(role.device), entropy)
                for name, column in out.items() if micro.counts else ():
                    column[mini.batch.token_index(torch.tensor(micro.rows))] = now.need(name).to(column)
        self.world.sum_(list(out.values()))
        return Forward(**out)

    def _verify(self, mini: Rollout, micros: Sequence[Micro], metrics: Mean) -> None:
        """Compares the ids and log-probs that enter the loss with the hashes that the engine took when sampling."""
        total, wrong = 0, []
        for micro in micros:
            part = micro.rollout
            count, bad = compare_digests(
                micro.inputs.targets, part.batch["logp_rollout"], part.batch.offsets, part.checks
            )
            total += count
            wrong += [f"{part.ids[row]} turn {turn}" for row, turn in bad]
        if total:
            metrics.add({"trained_equals_sampled": 1 - len(wrong) / total})
        if wrong:
            what = f"{len(wrong)} of {total} sampled spans are not what is trained on: {', '.join(wrong[:5])}"
            self._stop("trained-not-sampled", what, mini)

    def _stop(self, kind: str, reason: str, rollout: Rollout) -> None:
        folder = Path(self.recipe.out) / "repro" / f"{kind}-step-{self.version}-rank-{self.world.rank}"
        info = {
            "version": self.version,
            "objective": self.objective.name,
            "recipe": self.recipe.model_dump(mode="json"),
        }
        raise LearnerStopped(reason, write_bundle(folder, rollout, reason, info))

    def save(self, folder: Path) -> None:
        """Everything that `load` needs to go on with equal bits. All ranks call it; rank 0 writes, atomically."""
        persist.save(self, folder)

    def load(self, folder: Path) -> None:
        """Goes on where `save` was called. Weights are copied in place. Raises `CheckpointError` when it cannot be."""
        persist.load(self, folder)

    def full_weights(self) -> dict[str, Tensor]:
        """The policy's weights by name, whole, on the CPU: what a serving engine is sent. All ranks call it."""
        return persist.full_weights(self)

    def save_model(self, folder: Path) -> None:
        """The policy as an ordinary transformers folder, adapters merged, with its tokenizer; atomic. All ranks call
        it."""
        persist.save_model(self, folder)

    def save_adapter(self, folder: Path) -> None:
        """The policy's adapters as a folder of the peft library; atomic. All ranks call it."""
        persist.save_adapter(self, folder)

    def save_critic(self, folder: Path, kind: str = "critic") -> None:
        """The critic as a folder that `objective.critic.path` can name; atomic. All ranks call it."""
        persist.save_critic(self, folder, kind)
