"""The embedded engine keeps the contract, with one forward pass for rows of any age, and in lockstep equal bits."""

from __future__ import annotations

from typing import Any

from retool.engines.transformers_engine import TransformersEngine
from tests.engines.contract import WeightsContract
from tests.engines.speakers import bpe_tokenizer, speaker, tag_tokenizer


class TestTransformers(WeightsContract):
    def tokenizer(self, kind: str) -> Any:
        return bpe_tokenizer() if kind == "bpe" else tag_tokenizer()

    def make(self, kind: str, slots: int = 8, **options: Any) -> TransformersEngine:
        return TransformersEngine(speaker(kind), self.tokenizer(kind), slots=slots, **options)

    def model(self, engine: TransformersEngine) -> Any:
        return engine._model
