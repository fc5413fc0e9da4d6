"""Tokenizers of every kind that matters here: one token a character, byte-level BPE with merges over tags, and one with
a normaliser that turns look-alikes into tags."""

from __future__ import annotations

import string
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from retool.models import DEFAULT_TAGS, tiny_tokenizer

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CORPUS = [
    "<code>\n```python\nprint(1 + 2)\n```\n</code>\n<interpreter>\n3\n</interpreter>\n\nSo\n<answer>\n\\boxed{3}\n",
    "</code>\n</code>\n</code>\n</interpreter>\n\n</interpreter>\n\n>\n>\n>\n\n>\n\n>\n",
    "What is the sum of the numbers? The quick brown fox computes 12 * 34 and prints the answer.\n",
] * 30


def bpe_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level BPE that has merged `>` with newlines, as real ones have; tags are several tokens."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator((line + "\n" for text in CORPUS for line in text.split("\n")), trainer)
    return _wrap(tok, template)


def normalising_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE whose normaliser (NFKC) turns full-width look-alikes into tags, which are added tokens."""
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.NFKC()
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(CORPUS, trainer)
    tok.add_tokens([AddedToken(t, special=False, normalized=True) for t in DEFAULT_TAGS])
    return _wrap(tok, TEMPLATE)


def prefix_space_tokenizer() -> PreTrainedTokenizerFast:
    """Puts a space in front of whatever starts a string, as SentencePiece models do."""
    tok = Tokenizer(models.BPE(unk_token="<unk>"))
    tok.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tok.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<unk>", *SPECIAL],
        initial_alphabet=list(string.printable),
        show_progress=False,
    )
    tok.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, eos_token="<|im_end|>", unk_token="<unk>", chat_template=TEMPLATE
    )


def _wrap(tok: Tokenizer, template: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


@pytest.fixture(scope="session")
def bpe() -> Any:
    return bpe_tokenizer()


@pytest.fixture(scope="session")
def normalising() -> Any:
    return normalising_tokenizer()


@pytest.fixture(scope="session")
def prefix_space() -> Any:
    return prefix_space_tokenizer()


@pytest.fixture(scope="session")
def tiny() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="session", params=["tiny", "bpe", "normalising", "prefix_space"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return request.getfixturevalue(request.param)
