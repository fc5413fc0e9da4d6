"""Models and tokenizers: load one, or make a small character-level Llama from scratch.

The small one is for the demo and for tests: it is saved as an ordinary transformers folder, so every other part of
the house treats it like any model.
"""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from retool.config import ModelConfig, TinyModelConfig
from retool.errors import UserError

TINY_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'tool' %}<|user|><tool_response>{{ message['content'] }}"
    "</tool_response>{% else %}<|{{ message['role'] }}|>{{ message['content'] }}{% endif %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TINY_SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>", "<|unk|>")
DEFAULT_TAGS = ("<code>", "</code>", "<interpreter>", "</interpreter>", "<answer>", "</answer>")

transformers_logging.disable_progress_bar()  # our own bars tell what is going on


class ModelError(UserError):
    """A model that cannot be used; the message says what to do."""


def tiny_tokenizer(tags: tuple[str, ...] = DEFAULT_TAGS) -> PreTrainedTokenizerFast:
    """Character-level tokenizer over printable ASCII; every tag is one (non-special) token."""
    chars = [*string.printable[:95], "\n"]
    vocab = {t: i for i, t in enumerate((*TINY_SPECIAL, *chars))}
    tok = Tokenizer(models.WordLevel(vocab, unk_token="<|unk|>"))
    tok.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tok.decoder = decoders.Fuse()
    tok.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in TINY_SPECIAL])
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        chat_template=TINY_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def tiny_model(config: TinyModelConfig, vocab_size: int, seed: int, eos: int, pad: int) -> LlamaForCausalLM:
    """A small Llama with random weights; equal seeds give equal weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=vocab_size,
                hidden_size=config.hidden,
                intermediate_size=config.intermediate,
                num_hidden_layers=config.layers,
                num_attention_heads=config.heads,
                num_key_value_heads=config.heads,
                head_dim=config.head_dim,
                max_position_embeddings=config.context,
                tie_word_embeddings=True,
                initializer_range=config.init_std,
                eos_token_id=eos,
                pad_token_id=pad,
                bos_token_id=None,
                attn_implementation="sdpa",
            )
        ).float()


def pick_device(device: str) -> torch.device:
    """`auto` is the GPU when there is one."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device(device)


def load_tokenizer(config: ModelConfig, tags: tuple[str, ...] = DEFAULT_TAGS) -> Any:
    """The tokenizer of a model; raises `ModelError` when it has no chat template."""
    if config.path is None:
        return tiny_tokenizer(tags)
    tokenizer = AutoTokenizer.from_pretrained(_existing(config.path))
    if config.chat_template is not None:
        tokenizer.chat_template = config.chat_template
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer of {config.path!r} has no chat template; set `model.chat_template` in the recipe"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: ModelConfig, tokenizer: Any, seed: int = 0) -> Any:
    """The policy model, in eval mode (no dropout anywhere), on its device."""
    dtype = getattr(torch, config.dtype)
    if config.path is None:
        tiny = config.tiny or TinyModelConfig()
        model: Any = tiny_model(tiny, len(tokenizer), seed, tokenizer.eos_token_id, tokenizer.pad_token_id).to(dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(
            _existing(config.path), dtype=dtype, attn_implementation="sdpa", trust_remote_code=False
        )
    return model.to(pick_device(config.device)).eval()


def _existing(path: str) -> str:
    """A path that looks local must exist; anything else is a hub name."""
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1
    folder = Path(path).expanduser()
    if folder.exists():
        if not (folder / "config.json").exists():
            raise ModelError(f"{path!r} holds no model (no config.json); give a transformers folder or a hub name")
        return str(folder)
    if looks_local:
        raise ModelError(f"there is no model folder {path!r}; train one first, or give a hub name like org/model")
    return path
