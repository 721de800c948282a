"""Every family from source to checkpoint: what is written is what transformers reads, and nothing else has changed.

Weight-only formats, so that both sides compute with the same numbers; mixtures of experts, whose NVFP4 global scales
transformers drops, are decoded from the stored bytes and put into a PlainMixture.
"""

import os
import pathlib
import shutil
import subprocess

import pytest
import torch
import torch.nn.functional as F
from reference_models import bundled_model, load_model, make_checkpoint, random_ids, unpack_experts
from safetensors import safe_open
from safetensors.torch import load_file
from stored import decode

PROGRAM = os.environ["PRISMAQUANT_BINARY"]
DUMP = str(pathlib.Path(PROGRAM).parent / "sequence_dump")
WIDE = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
CASES = {
    "llama": {"family": "llama", "config": WIDE | {"attention_bias": True}},
    "mistral": {"family": "mistral", "config": WIDE | {"sliding_window": 16}},
    "qwen2": {"family": "qwen2", "tie": True, "config": WIDE},
    "qwen3": {"family": "qwen3", "config": WIDE},
    "gemma3_text": {"family": "gemma3_text", "tie": True, "config": WIDE},
    "gemma3": {"family": "gemma3", "tie": True, "config": WIDE},
    "qwen3_5_text": {"family": "qwen3_5_text", "config": WIDE},
    "qwen3_moe": {"family": "qwen3_moe", "config": WIDE | {"moe_intermediate_size": 128}},
}


def stored(folder: pathlib.Path) -> dict:
    tensors = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            tensors |= {name: opened.get_tensor(name) for name in opened.keys()}
    return tensors


def family_source(family: str, folder: pathlib.Path) -> pathlib.Path:
    make_checkpoint(CASES[family], folder, torch.bfloat16)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(bundled_model() / name, folder)
    return folder


@pytest.fixture(scope="module", params=CASES)
def source(request, tmp_path_factory) -> pathlib.Path:
    return family_source(request.param, tmp_path_factory.mktemp("source") / "model")


def quantize(source: pathlib.Path, out: pathlib.Path, *options) -> pathlib.Path:
    done = subprocess.run([PROGRAM, "quantize", source, out, "--calibration", bundled_model() / "calibration.txt", "--samples", "3",
                           "--tokens", "64", "--kernels", "any", "--no-eval", "--precision", "float32", *options],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


def quantized_linears(tensors: dict) -> set[str]:
    return {name.removesuffix(".weight_scale") for name in tensors if name.endswith(".weight_scale")}


def test_only_linears_change(source, tmp_path):
    out = stored(quantize(source, tmp_path / "out", "--bpp", "6", "--formats", "nvfp4,fp8,bf16"))
    linears = quantized_linears(out)
    assert len(linears) > 5
    compared = 0
    for name, tensor in stored(source).items():
        if name.removesuffix(".weight") in linears:
            continue
        assert out[name].dtype == tensor.dtype and torch.equal(out[name].view(torch.uint8), tensor.view(torch.uint8)), name
        compared += 1
    assert compared >= 5


@torch.no_grad()
@pytest.mark.parametrize("number_format", ["nvfp4a16", "int4"])
def test_transformers_computes_the_same(number_format, source, tmp_path):
    out = quantize(source, tmp_path / "out", "--uniform", number_format, "--render", "rtn")
    tensors = stored(out)
    ids = random_ids({"config": WIDE}, 2, 40)
    (tmp_path / "ids.json").write_text(str(ids.tolist()))
    done = subprocess.run([DUMP, out, tmp_path / "ids.json", "-", "float32", tmp_path / "dump.safetensors"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "dump.safetensors")
    experts = any(".experts." in name for name in tensors)
    model = load_model(source if experts else out, torch.bfloat16)
    if hasattr(model, "ct_decompress_hook"):
        model(input_ids=ids[:, :3], use_cache=False)
    model = model.to(torch.float32)
    scaled = model.get_input_embeddings()
    if hasattr(scaled, "scalar_embed_scale"):  # Gemma's, which was rounded to bfloat16
        scaled.forward = lambda tokens: F.embedding(tokens, scaled.weight) * scaled.scalar_embed_scale
    unpack_experts(model)
    replaced = 0
    for name, module in model.named_modules():
        name = name.replace("model.language_model.", "language_model.model.") if "gemma3" in str(type(model)) else name
        if isinstance(module, torch.nn.Linear) and name in quantized_linears(tensors):
            kind, weight = decode(tensors, name)
            assert kind == number_format
            if not experts:
                assert module.quantization_scheme is not None, name
            module.weight.data = weight
            replaced += 1
    assert replaced == len(quantized_linears(tensors)) > 5
    logits = model(input_ids=ids, use_cache=False).logits
    for n in range(2):
        error = (found[f"text.{n}.logits"] - logits[n]).abs().max() / (logits.max() - logits.min())
        assert error <= 2e-5, error
