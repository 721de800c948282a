#!/usr/bin/env python3
"""Measures a checkpoint against its source with transformers and compressed-tensors alone, and prints one JSON object.

usage: evaluate.py SOURCE CHECKPOINT --text FILE [--tokens 4096] [--reference FILE]

Everything is computed in float32. Weights are decoded from the stored bytes by tests/oracle/stored.py, which knows the
definitions of the formats and nothing of the program; activations are quantized by the forward pass that compressed-tensors
gives a Linear when it loads one. The text is one stream without BOS, cut in windows; each window is a forward pass of its own.
--reference keeps the source's log-probabilities (windows x 511 x vocabulary, float32) for the next checkpoint of the same source and text.
"""
import argparse
import json
import math
import pathlib
import sys
from collections.abc import Iterable

import torch
import torch.nn.functional as F
import transformers

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "tests" / "oracle"))
from stored import decode, tensors  # noqa: E402

WINDOW = 512


def text_windows(model: pathlib.Path, text: pathlib.Path, count: int, length: int = WINDOW) -> torch.Tensor:
    """The first `count` windows of the text's tokens, [count, length]."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    ids = tokenizer(text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"][: count * length]
    if len(ids) < count * length:
        sys.exit(f"{text}: {len(ids)} tokens, expected at least {count * length}")
    return torch.tensor(ids).view(count, length)


def load_model(folder: pathlib.Path, dtype: torch.dtype) -> torch.nn.Module:
    """The class that config.json names. For a multimodal checkpoint that is the class of the whole model."""
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    return getattr(transformers, architecture).from_pretrained(folder, dtype=dtype).eval()


def text_linears(model: torch.nn.Module) -> dict[str, torch.nn.Linear]:
    """What bits per weight are counted over: the Linears of the text body, without output projection and vision tower."""
    head = model.get_output_embeddings()
    return {name: module for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and module is not head and ".visual." not in f".{name}."}


def load_exactly(folder: pathlib.Path, stored: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model in float32 with the weights that its bytes stand for.

    compressed-tensors unpacks into bfloat16, in the first forward pass, and keeps the quantizers of the activations, whose global scales
    must not pass through bfloat16 either.
    """
    model = load_model(folder, torch.bfloat16)
    if hasattr(model, "ct_decompress_hook"):
        model(input_ids=torch.tensor([[0, 1]]), use_cache=False)
    model = model.to(torch.float32)
    for name, module in text_linears(model).items():
        format_name, weight = decode(stored, name)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        scale = stored.get(f"{name}.input_global_scale")
        if scale is not None:
            module.input_global_scale.data = scale.float()
        if format_name in ("nvfp4", "mxfp4", "mxfp8", "fp8"):
            check_activations(name, module)
    return model


@torch.no_grad()
def check_activations(name: str, module: torch.nn.Linear) -> None:
    """Loaded the wrong way a Linear has quantized weights and plain activations, and the figures flatter it."""
    x = torch.randn(4, module.in_features, generator=torch.Generator().manual_seed(1))
    if torch.equal(module(x), F.linear(x, module.weight, module.bias)):
        sys.exit(f"{name}: compressed-tensors does not quantize the activations of this module")


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, window: torch.Tensor) -> torch.Tensor:
    """Of every token but the first, [window - 1, vocabulary]."""
    return F.log_softmax(model(input_ids=window[None], use_cache=False).logits[0, :-1].float(), -1)


def reference(source: pathlib.Path, windows: torch.Tensor, cache: pathlib.Path | None) -> Iterable[torch.Tensor]:
    """The source's log-probabilities, window by window."""
    if cache is not None and cache.exists():
        return torch.load(cache, mmap=True)
    model = load_model(source, torch.float32)
    computed = (log_probabilities(model, window) for window in windows)
    if cache is None:
        return computed
    partial = cache.with_suffix(".partial")
    torch.save(torch.stack(list(computed)), partial)
    partial.rename(cache)
    return torch.load(cache, mmap=True)


def compare(source: Iterable[torch.Tensor], quantized: torch.nn.Module, windows: torch.Tensor) -> dict:
    """KL divergence (nats per token), perplexity and top-1 agreement over all tokens but the first of each window."""
    kl_windows, agree, nll_source, nll, scored = [], 0, 0.0, 0.0, 0
    for p, window in zip(source, windows):
        q, target = log_probabilities(quantized, window), window[1:, None]
        kl_windows.append((p.exp() * (p - q)).sum(-1).double().mean().item())
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
        nll_source -= p.gather(1, target).double().sum().item()
        nll -= q.gather(1, target).double().sum().item()
        scored += len(target)
    kl = torch.tensor(kl_windows, dtype=torch.float64)
    return {"scored": scored, "kl": kl.mean().item(), "kl_stderr": (kl.std() / math.sqrt(len(kl))).item(), "kl_windows": kl_windows,
            "ppl_source": math.exp(nll_source / scored), "ppl": math.exp(nll / scored), "delta_nll": (nll - nll_source) / scored,
            "top1": agree / scored}


def sizes(folder: pathlib.Path, model: torch.nn.Module, stored: dict[str, torch.Tensor]) -> dict:
    """Bytes of the weights files, and bits per weight of the text's Linears with all their scales."""
    linears = text_linears(model)
    linear_bytes, formats = 0, {}
    for name in linears:
        parts = [tensor for key, tensor in stored.items() if key.startswith(f"{name}.") and not key.endswith(".bias")]
        linear_bytes += sum(part.nbytes for part in parts)
        format_name = decode(stored, name)[0]
        formats[format_name] = formats.get(format_name, 0) + 1
    weights = sum(module.in_features * module.out_features for module in linears.values())
    return {"file_bytes": sum(path.stat().st_size for path in folder.glob("*.safetensors")), "linear_bytes": linear_bytes,
            "bpp": 8 * linear_bytes / weights, "formats": formats}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("checkpoint", type=pathlib.Path)
    parser.add_argument("--text", type=pathlib.Path, required=True)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--reference", type=pathlib.Path)
    arguments = parser.parse_args()
    windows = text_windows(arguments.source, arguments.text, arguments.tokens // WINDOW)
    stored = tensors(arguments.checkpoint)
    model = load_exactly(arguments.checkpoint, stored)
    source = reference(arguments.source, windows, arguments.reference)
    print(json.dumps({**sizes(arguments.checkpoint, model, stored), **compare(source, model, windows)}))


if __name__ == "__main__":
    main()
