"""One typed configuration of a run. Unknown keys are refused; `retool.recipe` reads files and applies presets."""

from retool.config.engine import EngineConfig
from retool.config.objective import ObjectiveConfig
from retool.config.recipe import (
    DataConfig,
    DynamicConfig,
    EvalConfig,
    LearnerConfig,
    LoraConfig,
    ModelConfig,
    ProblemsConfig,
    ProtocolConfig,
    Recipe,
    RolloutConfig,
    SandboxConfig,
    SftConfig,
    TinyModelConfig,
)
from retool.config.reward import RewardConfig

__all__ = [
    "DataConfig",
    "DynamicConfig",
    "EngineConfig",
    "EvalConfig",
    "LearnerConfig",
    "LoraConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "ProblemsConfig",
    "ProtocolConfig",
    "Recipe",
    "RewardConfig",
    "RolloutConfig",
    "SandboxConfig",
    "SftConfig",
    "TinyModelConfig",
]
