"""How long do new weights take to a vLLM server? A random Llama of chosen size, a server started here, `engine.sync`
timed for each way.

    python -m benchmarks.weight_sync [--hidden 576 --layers 30 --vocab 49152] [--ways file gloo] [--syncs 5]

The default is a model of 135 million parameters in float32. Prints one line a way: median and all times in seconds,
from the call of `sync` to its end: written or sent, loaded, caches dropped, two probes compared.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from retool.engines.vllm_adapter import Server
from retool.engines.vllm_engine import VllmEngine
from retool.engines.vllm_server import LocalServer, find_python
from retool.models import tiny_tokenizer


def random_llama(hidden: int, layers: int, vocab: int) -> Any:
    """Heads of 64, a third as many for keys and values, tied embeddings."""
    heads = hidden // 64
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 3),
        vocab_size=vocab,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(config).eval()


async def timed(model: Any, tokenizer: Any, url: str, way: Any, syncs: int) -> list[float]:
    """Seconds of each update after the first."""
    engine = VllmEngine(model, tokenizer, [Server(url)], context=256, weight_sync=way)
    found = []
    try:
        for version in range(syncs + 1):
            begun = time.perf_counter()
            await engine.sync(None, version)
            found.append(time.perf_counter() - begun)
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.001)
    finally:
        await engine.close()
    return found[1:]


async def measure(args: argparse.Namespace) -> None:
    model, tokenizer = random_llama(args.hidden, args.layers, args.vocab), tiny_tokenizer()
    count = sum(p.numel() for p in model.parameters())
    print(f"{count / 1e6:.1f} million parameters, float32, {torch.get_num_threads()} threads", flush=True)
    cpu = not torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        own = LocalServer.new(find_python(None), folder, context=256, slots=4, cpu=cpu)
        client = Server(own.url)
        try:
            own.start()
            await own.wait(900, client.check)
            for way in args.ways:
                seconds = await timed(model, tokenizer, own.url, way, args.syncs)
                every = ", ".join(f"{s:.2f}" for s in seconds)
                print(f"{way}: {statistics.median(seconds):.2f} s ({every})", flush=True)
        finally:
            await client.close()
            own.remove()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{Path(__file__).stem}")
    for name, default in (("hidden", 576), ("layers", 30), ("vocab", 49152), ("syncs", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--ways", nargs="+", default=["file", "gloo"])
    asyncio.run(measure(parser.parse_args()))


if __name__ == "__main__":
    main()
