"""Chat templates of well-known families, re-created in short with the properties that matter here (what is dropped,
trimmed, wrapped, refused), each with a small byte-level BPE tokenizer that has the family's special tokens."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEMPLATES = Path(__file__).parent / "templates"
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>")

# name: (special tokens, the one that ends a turn, added tokens that are not special)
FAMILIES: dict[str, tuple[tuple[str, ...], str, tuple[str, ...]]] = {
    "smollm2": (CHATML, "<|im_end|>", ()),
    "qwen2_5": (CHATML, "<|im_end|>", QWEN[:2]),
    "qwen3": (CHATML, "<|im_end|>", QWEN),
    "qwen3_thinking": (CHATML, "<|im_end|>", QWEN),
    "llama3": (
        ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>"),
        "<|eot_id|>",
        (),
    ),
    "mistral": (
        ("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
        "</s>",
        (),
    ),
    "gemma2": (("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"), "<end_of_turn>", ()),
    "deepseek_r1": (
        (
            "<｜begin▁of▁sentence｜>",
            "<｜end▁of▁sentence｜>",
            "<｜User｜>",
            "<｜Assistant｜>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁outputs▁begin｜>",
            "<｜tool▁outputs▁end｜>",
        ),
        "<｜end▁of▁sentence｜>",
        ("<think>", "</think>"),
    ),
    "phi3": (("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"), "<|end|>", ()),
    "phi4_mini": (
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>", "<|/tool|>", "<|end|>"),
        "<|end|>",
        (),
    ),
    "granite3": (("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"), "<|end_of_text|>", ()),
    "glm4_5": (
        ("[gMASK]", "<sop>", "<|user|>", "<|assistant|>", "<|observation|>", "<|endoftext|>"),
        "<|endoftext|>",
        QWEN,
    ),
}

_TEXT = (
    "What is the sum of 12 * 34 and 56 * 78? Let me compute that. Now the second one, by program.\n",
    "Solve the problem step by step. Each script prints what you want to know. End with the final answer.\n",
    '{"name": "python", "arguments": {"code": "print(12 * 34)"}}\n\nit is 408\n\nassistant\nuser\n',
)


@cache
def family_tokenizer(name: str) -> Any:
    """The tokenizer of a family with its chat template."""
    special, end, added = FAMILIES[name]
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400 + len(special),
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(_TEXT * 20, trainer)
    tok.add_tokens([AddedToken(t, special=False, normalized=False) for t in added])
    return PreTrainedTokenizerFast(
        tokenizer_object=tok,
        eos_token=end,
        pad_token=special[0],
        additional_special_tokens=list(special),
        chat_template=(TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"),
        clean_up_tokenization_spaces=False,
    )
