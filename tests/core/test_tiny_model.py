"""The small model made from scratch: what its keys make, and what they refuse."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from retool.config import ModelConfig
from retool.config.recipe import TinyModelConfig
from retool.engines.vllm_adapter import CPU_HEAD_SIZES
from retool.models import tiny_model
from retool.recipe import load_recipe


def test_heads_may_be_wider_than_their_share_of_the_model() -> None:
    narrow = tiny_model(TinyModelConfig(hidden=96, heads=4), 40, 0, 1, 2)
    wide = tiny_model(TinyModelConfig(hidden=96, heads=4, head_dim=32), 40, 0, 1, 2)
    assert narrow.model.layers[0].self_attn.q_proj.weight.shape == (96, 96)
    assert wide.model.layers[0].self_attn.q_proj.weight.shape == (128, 96)
    assert wide.config.num_attention_heads == narrow.config.num_attention_heads == 4


@pytest.mark.parametrize(("bad", "says"), [({"hidden": 90}, "multiple of heads"), ({"head_dim": 31}, "even")])
def test_impossible_heads_are_refused(bad: dict[str, int], says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        ModelConfig(tiny=TinyModelConfig(**{"hidden": 96, "heads": 4, **bad}))


def test_the_demos_model_can_be_served_without_a_gpu() -> None:
    tiny = load_recipe("recipes/demo.yaml", []).model.tiny
    assert tiny is not None and tiny_model(tiny, 40, 0, 1, 2).config.head_dim in CPU_HEAD_SIZES
