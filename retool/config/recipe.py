"""The sections of a recipe. Precedence of values: recipe > preset > the defaults written here."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from retool.config.base import Section
from retool.config.engine import EngineConfig
from retool.config.objective import ObjectiveConfig
from retool.config.reward import RewardConfig


class TinyModelConfig(Section):
    """A small Llama with a character-level tokenizer, made from scratch: for the demo and for tests."""

    hidden: int = Field(96, ge=8)
    """Width of the residual stream."""
    layers: int = Field(3, ge=1)
    """Number of decoder layers."""
    heads: int = Field(4, ge=1)
    """Attention heads."""
    head_dim: int | None = Field(None, ge=2)
    """Numbers in a head; default: `hidden` / `heads`, which must then be whole. On CPU vLLM knows 32, 64, 80, ..."""
    intermediate: int = Field(256, ge=8)
    """Width of the feed-forward layer."""
    context: int = Field(256, ge=16)
    """Longest sequence in tokens."""
    init_std: float = Field(0.08, gt=0)
    """Standard deviation of the initial weights; small models learn to copy much sooner with more than 0.02."""

    @model_validator(mode="after")
    def _heads_divide(self) -> TinyModelConfig:
        if self.head_dim is None and self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads}), or set head_dim")
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: positions rotate pairs")
        return self


class LoraConfig(Section):
    """Low-rank adapters: the model stays as it is, and beside its linear layers thin matrices learn."""

    rank: int = Field(16, ge=1)
    """Width of an adapter."""
    alpha: float = Field(32.0, gt=0)
    """What an adapter adds is multiplied by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Layers that get one, e.g. [q_proj, v_proj]; default: every linear layer of the model's blocks."""


class ModelConfig(Section):
    """The policy's starting weights: a path or hub name, or a small model made from scratch."""

    path: str | None = None
    """Folder with a transformers model, or a hub name. Relative paths are relative to the working directory."""
    tiny: TinyModelConfig | None = None
    """Make a small model instead of loading one."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of the trained weights."""
    device: str = "auto"
    """`auto` takes a GPU when there is one; otherwise `cpu`, `cuda`, `cuda:1`, ..."""
    chat_template: str | None = None
    """A Jinja template used instead of the tokenizer's own."""
    lora: LoraConfig | None = None
    """Train adapters instead of the whole model (`retool sft` and `retool train`); `{}` takes their defaults."""


class ProblemsConfig(Section):
    """Where problems come from."""

    kind: Literal["procedural", "jsonl", "parquet", "hf"] = "procedural"
    """`procedural` makes them from `families`; the others read rows."""
    path: str | None = None
    """File (jsonl, parquet) or hub data set name (hf)."""
    subset: str | None = None
    """Configuration name of a hub data set."""
    split: str = "train"
    """Split of a hub data set."""
    families: tuple[str, ...] = ()
    """Names of procedural families, see retool/problems/families.py; a wrong name is answered with the right ones."""
    count: int | None = Field(None, ge=1)
    """How many problems: required for procedural ones, a limit for the others."""
    seed: int = 0
    """Seed of procedural problems and of shuffling."""
    shuffle: bool = True
    """Shuffle rows (with `seed`) before `count` is applied."""
    prompt_field: str = "question"
    """Row field that holds the question."""
    answer_field: str = "answer"
    """Row field that holds the reference answer."""
    answer_pattern: str | None = None
    r"""Regular expression whose first group is the answer inside the field, e.g. `####\s*(.+)` for GSM8K."""
    skip_bad: bool = False
    """Leave out rows without a question or an answer, with a warning that counts them, instead of refusing the set."""


class ProtocolConfig(Section):
    """How a tool call looks in text."""

    name: Literal["tags", "hermes", "fenced"] = "tags"
    """Format of tool calls: `tags` (ReTool), `hermes` (native tool calls through the model's chat template), `fenced`
    (markdown fences, as tool-integrated reasoning has them). See docs/protocols.md."""
    fence: bool = True
    """Whether code stands in a markdown fence inside its tags. Read by `tags`; the others have a shape of their own."""
    code: tuple[str, str] = ("<code>", "</code>")
    """Tags around a call; of `tags` only."""
    observation: tuple[str, str] = ("<interpreter>", "</interpreter>")
    """Tags around a result; of `tags` only."""
    answer: tuple[str, str] = ("<answer>", "</answer>")
    """Tags around the answer section; `hermes` and `fenced` have one only with `boxed: false`."""
    boxed: bool = True
    r"""Whether the answer must stand in `\boxed{}`; false: the whole answer section is the answer."""
    instructions: str | None = None
    """Text in front of every question instead of the built-in instructions; an empty string for none."""

    @model_validator(mode="after")
    def _keys_fit_the_format(self) -> ProtocolConfig:
        if self.name == "tags":
            return self
        for key in ("code", "observation"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"protocol.{key} belongs to protocol.name=tags: the tags of {self.name} are fixed; remove the key"
                )
        if self.boxed and self.answer != type(self).model_fields["answer"].default:
            raise ValueError(
                f"protocol.answer is not read by protocol.name={self.name} with boxed: true, where the box is the "
                "answer; remove the key, or set protocol.boxed=false"
            )
        return self


class SandboxConfig(Section):
    """Which sandbox runs model-written code."""

    kind: Literal["local", "remote", "docker"] = "local"
    """`local` is embedded: a supervisor process over a unix socket. `remote`: servers started with
    `retool sandbox serve`, at `urls`. `docker`: the same server in a hardened container that the run starts and
    ends."""
    urls: tuple[str, ...] = ()
    """Servers of a remote sandbox: `http://HOST:PORT`, `https://HOST` or `unix:/PATH`. Calls go to the least loaded.
    `dns+http://NAME:PORT` is one server for each address that the name has when the run starts."""
    image: str = "retool-sandbox"
    """Image of a docker sandbox, built from docker/sandbox.Dockerfile."""
    runtime: str | None = None
    """Container runtime of a docker sandbox instead of the engine's default, e.g. `runsc` (gVisor)."""
    container_memory_mb: int = Field(6144, ge=256)
    """Memory of the container of a docker sandbox in MiB, for all executions together."""
    token_env: str | None = None
    """Name of the environment variable that holds the servers' token; the token itself never stands in a recipe."""
    profile: Literal["auto", "py-bare", "py-math", "py-data"] = "py-math"
    """Which modules the warm interpreter has imported; `auto` looks at what the code imports."""
    workers: int | None = Field(None, ge=1)
    """Executions at once; default: 1.5 per core. Not for a remote sandbox: servers have their own."""
    allow_unconfined: bool = False
    """Run without isolation when this machine offers none. Never for code you do not trust. Local only."""
    wall_s: float = Field(5.0, gt=0)
    """Wall clock limit of one execution in seconds."""
    cpu_s: float = Field(5.0, gt=0)
    """CPU limit of one execution in seconds."""
    memory_mb: int = Field(512, ge=16)
    """Memory of one execution in MiB, beyond what the warm interpreter holds."""
    retries: int = Field(3, ge=0)
    """How often an infrastructure failure is tried again before the trajectory is dropped."""

    @model_validator(mode="after")
    def _kind_fits(self) -> SandboxConfig:
        if self.kind == "remote" and not self.urls:
            raise ValueError("sandbox.kind remote needs sandbox.urls, e.g. sandbox.urls=[http://127.0.0.1:8080]")
        if self.kind == "remote" and (self.workers is not None or self.allow_unconfined):
            raise ValueError("sandbox.workers and sandbox.allow_unconfined belong to the server of a remote sandbox")
        if self.kind != "remote" and (self.urls or self.token_env is not None):
            raise ValueError("sandbox.urls and sandbox.token_env need sandbox.kind remote")
        if self.kind == "docker" and self.allow_unconfined:
            raise ValueError(
                "sandbox.allow_unconfined needs sandbox.kind local: a container confines or does not start"
            )
        if self.kind != "docker" and {"image", "runtime", "container_memory_mb"} & self._changed():
            raise ValueError("sandbox.image, sandbox.runtime and sandbox.container_memory_mb need sandbox.kind docker")
        for url in self.urls:
            if not url.startswith(("http://", "https://", "unix:", "dns+http://")):
                raise ValueError(f"sandbox.urls: {url!r}: write http://HOST:PORT, https://HOST or unix:/PATH")
        return self

    def _changed(self) -> set[str]:
        """Keys that differ from their defaults (a resolved recipe names them all)."""
        return {name for name, info in type(self).model_fields.items() if getattr(self, name) != info.default}


class DynamicConfig(Section):
    """Dynamic sampling (DAPO, 2503.14476): sample on until `rollout.prompts` groups teach something."""

    kind: Literal["none", "accuracy"] = "none"
    """`accuracy`: only groups with right and wrong answers count, judged on raw accuracy before any shaping."""
    batch: int | None = Field(None, ge=1)
    """Problems drawn at once; default: `rollout.prompts`."""
    max_batches: int = Field(10, ge=1)
    """After so many batches the step trains with what it has (metric `dynamic/starved`)."""
    max_staleness: int = Field(0, ge=0)
    """Surplus groups are used in later steps while the policy is at most so many updates older; 0 discards them."""


class RolloutConfig(Section):
    """How trajectories are sampled."""

    prompts: int = Field(16, ge=1)
    """Problems a step."""
    group_size: int = Field(8, ge=1)
    """Trajectories a problem (G)."""
    oversample: int = Field(1, ge=1)
    """Sample so many times `group_size` trajectories a problem; a filter such as `roc` takes G of them."""
    dynamic: DynamicConfig = DynamicConfig()
    """Dynamic sampling: more problems until enough groups teach something."""
    priority: Literal["none", "tracker"] = "none"
    """`none`: passes over the whole set. `tracker`: problems are drawn by the objective's own estimate of what they
    teach (`single_stream`); an objective without one draws uniformly."""
    max_turns: int = Field(4, ge=1)
    """Turns of the policy; a call in the last turn is not executed."""
    max_tokens: int = Field(256, ge=1)
    """Tokens after the prompt, tool output included."""
    temperature: float = Field(1.0, gt=0)
    """Sampling temperature; log-probs of the learner use the same."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus; 1 = off."""
    top_k: int = Field(0, ge=0)
    """0 = off."""
    observation_chars: int = Field(400, ge=16)
    """Longest tool output shown to the model; the middle is cut."""
    tool: bool = True
    """False bans the string that opens a call."""
    concurrency: int = Field(64, ge=1)
    """Episodes in flight."""
    engine_retries: int = Field(2, ge=0)
    """How often a turn that the engine failed is asked for again before the trajectory is dropped."""
    max_failed_share: float = Field(0.5, gt=0, le=1)
    """Stop the run when more than this share of a step's trajectories is lost to infrastructure."""

    @property
    def members(self) -> int:
        """Trajectories that are sampled a problem."""
        return self.group_size * self.oversample


class LearnerConfig(Section):
    """Optimisation."""

    lr: float = Field(1e-6, gt=0)
    """Policy learning rate."""
    critic_lr: float | None = Field(None, gt=0)
    """Critic learning rate; default: twice `lr`."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Learning-rate schedule after the warm-up."""
    warmup_steps: int = Field(0, ge=0)
    """Optimiser steps of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW moments."""
    grad_clip: float = Field(1.0, gt=0)
    """Gradient norm limit."""
    updates: int = Field(1, ge=1)
    """Optimiser steps (mini-batches) a rollout and epoch."""
    epochs: int = Field(1, ge=1)
    """Passes over a rollout."""
    micro_tokens: int = Field(8192, ge=1)
    """Most tokens in a micro-batch (an atom larger than that travels alone)."""
    micro_samples: int | None = Field(None, ge=1)
    """Most samples in a micro-batch; default: as many as `micro_tokens` holds."""
    layout: Literal["padded", "packed"] = "padded"
    """`padded`: rows of similar length side by side. `packed`: one row end to end (needs an attention that skips
    foreign tokens to be fast, so mostly for GPUs)."""
    shard: Literal["none", "fsdp"] = "none"
    """Under torchrun: whole networks on every rank, or split over the ranks with FSDP2 (for models that do not fit)."""
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, a third more time."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the learner and the embedded engine; default: all cores, 1 with `deterministic`."""


class DataConfig(Section):
    """Cold-start traces (`retool data generate`)."""

    problems: ProblemsConfig
    """Problems to write traces for."""
    teacher: Literal["programmatic"] = "programmatic"
    """Who writes the reasoning."""
    tool_share: float = Field(0.3, ge=0, le=1)
    """Share of traces that call the tool, independent of the problem's family."""
    seed: int = 0
    """Seed of the choices."""


class SftConfig(Section):
    """Supervised fine-tuning on traces."""

    head: Literal["language", "pairwise", "pointwise"] = "language"
    """`language`: the policy imitates traces. `pairwise` and `pointwise`: a reward model (a scalar head) learns to
    tell right solutions from wrong ones, by pairs or one by one; see docs/objectives.md."""
    data: str | None = None
    """JSONL of traces; default: what `retool data generate` wrote for this recipe. Of a reward model: JSONL of
    labelled traces or a run folder with rollouts; default: this recipe's run."""
    held_out: float = Field(0.1, gt=0, lt=1)
    """Share of the problems on which a reward model is judged and never trained."""
    steps: int = Field(250, ge=1)
    """Optimiser steps."""
    batch_size: int = Field(128, ge=1)
    """Traces (or pairs) a step."""
    lr: float = Field(1e-3, gt=0)
    """Learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "cosine"
    """Learning-rate schedule after the warm-up."""
    warmup_steps: int = Field(10, ge=0)
    """Steps of linear warm-up."""
    weight_decay: float = Field(0.0, ge=0)
    """AdamW weight decay."""
    checkpoint_every: int = Field(100, ge=1)
    """Steps between checkpoints."""


class EvalConfig(Section):
    """Evaluation on held-out problems."""

    problems: ProblemsConfig | None = None
    """Held-out problems."""
    every: int = Field(0, ge=0)
    """Evaluate every so many RL steps; 0 = only when asked."""
    samples: int = Field(1, ge=1)
    """Samples a problem (k)."""
    temperature: float = Field(1.0, ge=0)
    """Sampling temperature of evaluation; 0 = greedy."""
    top_p: float = Field(1.0, gt=0, le=1)
    """Nucleus of evaluation."""
    fork_temperature: float | None = Field(None, ge=0)
    """Temperature at forking tokens, where the entropy at temperature 1 is above `fork_entropy`; default:
    `temperature`. Inside a call's code it is at most 1."""
    rest_temperature: float | None = Field(None, ge=0)
    """Temperature at all other tokens; default: `temperature`."""
    fork_entropy: float = Field(0.672, ge=0)
    """Entropy in nats above which a token is a fork (2506.01939: the 80th percentile)."""


class Recipe(Section):
    """A whole run."""

    name: str = "run"
    """Name of the run."""
    out: str = "runs/run"
    """Run folder."""
    seed: int = 0
    """Seed of everything that is not a problem set."""
    deterministic: bool = False
    """Lockstep rollouts and fixed shapes: a resumed run ends in the same bits (CPU)."""
    steps: int = Field(100, ge=1)
    """RL steps."""
    checkpoint_every: int = Field(10, ge=1)
    """RL steps between checkpoints."""
    model: ModelConfig = ModelConfig()
    """The policy."""
    problems: ProblemsConfig = ProblemsConfig()
    """Training problems."""
    protocol: ProtocolConfig = ProtocolConfig()
    """Tool-call format."""
    sandbox: SandboxConfig = SandboxConfig()
    """The interpreter."""
    reward: RewardConfig = RewardConfig()
    """The reward."""
    engine: EngineConfig = EngineConfig()
    """The generation engine."""
    rollout: RolloutConfig = RolloutConfig()
    """Sampling of trajectories."""
    objective: ObjectiveConfig = ObjectiveConfig()
    """The algorithm."""
    learner: LearnerConfig = LearnerConfig()
    """Optimisation."""
    data: DataConfig | None = None
    """Cold-start data."""
    sft: SftConfig | None = None
    """Supervised fine-tuning before RL."""
    eval: EvalConfig = EvalConfig()
    """Evaluation."""

    @model_validator(mode="before")
    @classmethod
    def _overlong_lengths(cls, raw: Any) -> Any:
        """The lengths of the soft overlong punishment follow those of the rollout where they are not given."""
        reward, rollout = (raw.get(k) for k in ("reward", "rollout")) if isinstance(raw, dict) else (None, None)
        overlong = reward.get("overlong") if isinstance(reward, dict) else None
        if not isinstance(overlong, dict):
            return raw
        longest = overlong.get("max_tokens")
        if longest is None:
            longest = rollout.get("max_tokens") if isinstance(rollout, dict) else None
        if longest is None:
            longest = RolloutConfig().max_tokens
        if not isinstance(longest, int):
            return raw  # refused by its own field
        filled = {
            "max_tokens": longest,
            "buffer": max(1, longest // 5),
            **{k: v for k, v in overlong.items() if v is not None},
        }
        return {**raw, "reward": {**reward, "overlong": filled}}

    @model_validator(mode="after")
    def _lockstep_is_embedded(self) -> Recipe:
        if self.deterministic and self.engine.kind != "transformers":
            raise ValueError(
                "deterministic: true needs engine.kind transformers, because no server promises equal bits: add "
                "deterministic=false"
            )
        return self

    @model_validator(mode="after")
    def _adapters_fit(self) -> Recipe:
        lora = self.model.lora is not None
        if not lora and self.engine.weight_sync == "adapter":
            raise ValueError("engine.weight_sync adapter needs model.lora: without it there are only whole weights")
        if lora and self.learner.shard == "fsdp":
            raise ValueError("learner.shard fsdp is not there for model.lora: use none")
        if lora and self.objective.reference.kind in ("ema", "mix"):
            raise ValueError(
                f"objective.reference.kind {self.objective.reference.kind} averages weights, and the average of two "
                "adapters' factors is not the adapter of the average: use frozen or hard, or leave out model.lora"
            )
        return self

    @model_validator(mode="after")
    def _shuffled_scores_are_not_carried(self) -> Recipe:
        if self.reward.shuffle and self.rollout.dynamic.kind != "none" and self.rollout.dynamic.max_staleness > 0:
            raise ValueError("reward.shuffle permutes scores within a step: rollout.dynamic.max_staleness must be 0")
        return self
