"""Models and tokenizers that say something known: a small Llama that has learnt one dialogue by heart."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from retool.models import DEFAULT_TAGS, TINY_TEMPLATE, tiny_tokenizer

PROMPT = "Say it.\n"
TURN = "Let me run x = 12</code>\n"  # the last token of this turn carries more than the stop string
RESULT = "[12]\n"
REST = "So it is 12."
STOP = "</code>"


@cache
def bpe_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with merges such as `>` + newline."""
    tok = Tokenizer(models.BPE())
    # cuts only between words, so that merges may cross from `>` to the newline behind it
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(" ", "merged_with_next"), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|pad|>", "<|end|>", "<|user|>", "<|assistant|>"],
        show_progress=False,
    )
    tok.train_from_iterator(["a>\nb>\nc>\nd>\ne>\n", "code> code> /code> /code>"] * 20, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        chat_template=TINY_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


@cache
def tag_tokenizer() -> PreTrainedTokenizerFast:
    """Characters, every tag one token."""
    return tiny_tokenizer(DEFAULT_TAGS)


def encode(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


def small_llama(
    tokenizer: Any,
    seed: int = 0,
    kv_heads: int = 2,
    context: int = 128,
    head_dim: int | None = None,
    tied: bool = True,
) -> LlamaForCausalLM:
    """Grouped-query attention, random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            tie_word_embeddings=tied,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            attn_implementation="sdpa",
        )
        return LlamaForCausalLM(config).eval()


@cache
def _learnt(kind: str, head_dim: int | None, tied: bool, context: int, seed: int) -> dict[str, torch.Tensor]:
    tokenizer = bpe_tokenizer() if kind == "bpe" else tag_tokenizer()
    model = small_llama(tokenizer, seed, context=context, head_dim=head_dim, tied=tied)
    parts = [encode(tokenizer, t) for t in (PROMPT, TURN, RESULT, REST)]
    ids = torch.tensor([[i for p in parts for i in p] + [tokenizer.eos_token_id]])
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3, weight_decay=0.0)
    for _ in range(80):
        loss = model(input_ids=ids, labels=ids).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.15
    return {k: v.detach().clone() for k, v in model.state_dict().items()}


def speaker(
    kind: str, head_dim: int | None = None, tied: bool = True, context: int = 128, seed: int = 0
) -> LlamaForCausalLM:
    """A fresh copy of the model that has learnt `PROMPT TURN RESULT REST <end>` by heart."""
    tokenizer = bpe_tokenizer() if kind == "bpe" else tag_tokenizer()
    model = small_llama(tokenizer, context=context, head_dim=head_dim, tied=tied)
    model.load_state_dict(_learnt(kind, head_dim, tied, context, seed))
    return model.eval()
