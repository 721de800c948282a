"""The draft head of a checkpoint as the real vLLM loads it on a CPU: the names, and what its Linears do.

usage: draft.py MODEL_DIR RESPONSE.json LINEARS.safetensors

RESPONSE: {"parameters": names of the draft model's parameters, "loaded": those that vLLM's loader filled}.
LINEARS: "<layer name>.input" and ".output" [tokens, ..] of every quantized Linear for drawn inputs; a name begins with
the checkpoint's "mtp.".

The engine starts with speculative decoding but never drafts: that takes a Triton kernel, which a CPU does not have.
"""

import json
import sys

import torch
from safetensors.torch import save_file
from serve import SEEN_TOKENS, quantized_linears, register_emulation_kernels
from vllm import LLM
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader


class LoadingNotes:
    """The models that vLLM has loaded, in order, with the names of their parameters and of those loaded."""

    def __init__(self):
        self.models = []

    def attach(self) -> None:
        plain = DefaultModelLoader.load_weights

        def load_weights(loader, model, model_config):
            model.load_weights = self._noting(model, model.load_weights)
            plain(loader, model, model_config)

        DefaultModelLoader.load_weights = load_weights

    def _noting(self, model, load):
        def noting(weights):
            parameters = checkpoint_parameters(model)
            loaded = load(weights)
            self.models.append((model, parameters, loaded))
            return loaded

        return noting


def checkpoint_parameters(model) -> set[str]:
    """Without the scales of quantized KV caches, which have defaults."""
    caches = [name for name, module in model.named_modules()
              if isinstance(getattr(module, "quant_method", None), BaseKVCacheMethod)]
    return {name for name, _ in model.named_parameters() if name.rpartition(".")[0] not in caches}


@torch.no_grad()
def run_linears(model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    seen = {}
    for name, linear in quantized_linears(model).items():
        x = torch.randn(SEEN_TOKENS, linear.input_size, generator=generator).bfloat16()
        y = linear(x)
        name = name.replace("model.", "mtp.", 1)
        seen[name + ".input"], seen[name + ".output"] = x, (y[0] if isinstance(y, tuple) else y).clone()
    return seen


def main(model: str, response_file: str, linears_file: str) -> None:
    register_emulation_kernels()
    notes = LoadingNotes()
    notes.attach()
    LLM(
        model,
        enforce_eager=True,
        dtype="bfloat16",
        seed=0,
        max_model_len=512,
        speculative_config={"method": "mtp", "num_speculative_tokens": 3},
    )
    (_, _, _), (draft, parameters, loaded) = notes.models
    with open(response_file, "w") as file:
        json.dump({"parameters": sorted(parameters), "loaded": sorted(loaded)}, file)
    save_file(run_linears(draft), linears_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
