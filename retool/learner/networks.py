"""From a recipe and a policy model to the networks of a learner: policy, critic, reference, with their optimisers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from retool.config import Recipe
from retool.learner.checkpoint import CheckpointError
from retool.learner.head import check_head
from retool.learner.optimiser import Optimiser
from retool.learner.roles import (
    Role,
    base_role,
    critic_role,
    frozen_copy,
    language_role,
    silence_dropout,
    value_role,
)
from retool.learner.shard import shard
from retool.learner.value_model import ValueModel, read_value_model
from retool.learner.world import World
from retool.lora import add_adapters, has_adapters
from retool.objectives import Objective


@dataclass(frozen=True)
class Networks:
    """`roles`: reference, critic (where the objective has them) and policy. `moments`: what a loaded critic knows of
    the returns it was trained on (see `ObjectiveState`)."""

    roles: dict[str, Role]
    moments: dict[str, float]


def make_networks(recipe: Recipe, objective: Objective, model: Any, world: World) -> Networks:
    """Wraps `model`, which is trained in place (with `model.lora` it gets its adapters here), and makes the others.
    Raises `HeadError` for a model whose logits the learner cannot reproduce, `CheckpointError` for a critic that cannot
    be loaded."""
    c = recipe.learner
    model.eval()
    silence_dropout(model)
    if recipe.model.lora is not None and not has_adapters(model):
        add_adapters(model, recipe.model.lora, recipe.seed)
    roles: dict[str, Role] = {}
    moments: dict[str, float] = {}
    if objective.reference is not None and objective.reference.kind == "frozen" and has_adapters(model):
        roles["reference"] = base_role("reference", model, objective.temperature)
    elif objective.reference is not None:
        roles["reference"] = language_role("reference", frozen_copy(model), objective.temperature)
    if objective.critic is not None:
        roles["critic"], moments = _critic(recipe, model)
    roles["policy"] = language_role("policy", model, objective.temperature)
    check_head(model, roles["policy"].net.head)
    if c.activation_checkpointing:
        for name in set(roles) & {"policy", "critic"}:
            module = roles[name].module
            backbone = module.backbone if name == "critic" else module
            backbone.gradient_checkpointing_enable({"use_reentrant": False})
    factor = 1.0 if objective.critic is None else objective.critic.lr_factor
    for name, role in roles.items():
        if c.shard == "fsdp" and world.size > 1:
            shard(role.net, world)
        if name != "reference":
            lr = c.lr if name == "policy" else (c.critic_lr or factor * c.lr)
            role.optimiser = Optimiser(role.module, lr, c.betas, c.weight_decay)
    return Networks(roles, moments)


def _critic(recipe: Recipe, model: Any) -> tuple[Role, dict[str, float]]:
    critic = recipe.objective.critic
    if critic.path is None:
        return critic_role(model), {}
    loaded, moments = read_value_model(critic.path, model)
    silence_dropout(loaded)
    if critic.kind == "checkpoint" and bool(moments) != critic.normalise:
        raise CheckpointError(
            f"objective.critic.path: {critic.path!r} was trained with critic.normalise={str(bool(moments)).lower()}; "
            "its values mean nothing with the other setting"
        )
    return value_role(loaded), moments


def value_networks(recipe: Recipe, model: Any) -> dict[str, Role]:
    """The roles of a reward model's training: `model`'s own backbone with a scalar head learns; as a policy it is only
    there to be asked for its type and device."""
    model.eval()
    silence_dropout(model)
    c = recipe.learner
    critic = value_role(ValueModel(model.base_model))
    if c.activation_checkpointing:
        critic.module.backbone.gradient_checkpointing_enable({"use_reentrant": False})
    critic.optimiser = Optimiser(critic.module, c.lr, c.betas, c.weight_decay)
    return {"policy": language_role("policy", model, 1.0), "critic": critic}
