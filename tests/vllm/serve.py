"""Prompt log-probabilities, greedy continuations and captions from the real vLLM on a CPU, and what its Linears did.

usage: serve.py MODEL_DIR REQUEST.json RESPONSE.json [LINEARS.safetensors]

REQUEST: {"prompts": [[token id, ...], ...], "images": [{"image": file, "prompt": text}, ...], "max_tokens": n}.
RESPONSE: {"prompts": [{"log_probs": [null, log p of token 1 given token 0, ...] in nats, "text": the continuation},
...], "images": [{"prompt_ids": those of the chat that asks about the image, "ids": the reply's, "text": the reply,
"best": per token of the reply [[token id, log p], ...] of the most likely ones}, ...]}.
LINEARS: "<vLLM's layer name>.input" and ".output" [tokens, ..] of every quantized Linear for the first tokens of the
first prompt, of the vision tower's for the first patches of the first images.

vLLM lists no NVFP4 or MXFP8 kernel for CPUs; its own emulation kernels are registered here. That of NVFP4 quantizes
activations as a GPU does, that of MXFP8 leaves them alone. Loading, name mapping, fusing and the choice of schemes are
vLLM's.
"""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ALLOW_INSECURE_SERIALIZATION", "1")  # of the functions below, into this process
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm.model_executor.kernels.linear as kernels
from PIL import Image
from safetensors.torch import save_file
from vllm import LLM, SamplingParams
from vllm.platforms import PlatformEnum

SEEN_TOKENS = 16
BEST_TOKENS = 5
CHAT_TOKENS = 384  # with an image of the largest size


class NvFp4Kernel(kernels.EmulationNvFp4LinearKernel):
    """Takes [.., in] as vLLM's kernels on a GPU: the emulation takes [tokens, in], a vision tower gives [.., 1, in]."""

    def apply_weights(self, layer, x, bias=None):
        return super().apply_weights(layer, x.flatten(0, -2), bias).unflatten(0, x.shape[:-1])


def register_emulation_kernels() -> None:
    for table, kernel in (
        (kernels._POSSIBLE_NVFP4_KERNELS, NvFp4Kernel),
        (kernels._POSSIBLE_MXFP8_KERNELS, kernels.EmulationMxfp8LinearKernel),
    ):
        table.setdefault(PlatformEnum.CPU, []).append(kernel)


def quantized_linears(model) -> dict:
    return {
        name: module
        for name, module in model.named_modules()
        if type(getattr(module, "quant_method", None)).__name__ == "CompressedTensorsLinearMethod"
    }


class Recorder:
    """Inputs and outputs of the quantized Linears in the first pass that is long enough to be the prompt's."""

    def __init__(self):
        self.seen = {}

    def attach(self, model) -> None:
        for name, module in quantized_linears(model).items():
            module.register_forward_hook(self._hook(name))

    def _hook(self, name):
        def keep(_, inputs, output):
            y = output[0] if isinstance(output, tuple) else output
            if name + ".input" in self.seen or inputs[0].shape[0] < SEEN_TOKENS:
                return
            self.seen[name + ".input"] = inputs[0][:SEEN_TOKENS].detach().clone()
            self.seen[name + ".output"] = y[:SEEN_TOKENS].detach().clone()

        return keep


def question(image: str, prompt: str) -> list[dict]:
    content = [{"type": "image_pil", "image_pil": Image.open(image)}, {"type": "text", "text": prompt}]
    return [{"role": "user", "content": content}]


def best_tokens(log_probs: dict) -> list[list]:
    found = [[token, entry.logprob] for token, entry in log_probs.items()]
    return sorted(found, key=lambda pair: -pair[1])[:BEST_TOKENS]


def captions(engine: LLM, images: list[dict], max_tokens: int) -> list[dict]:
    if not images:
        return []
    outputs = engine.chat(
        [question(**image) for image in images],
        SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=BEST_TOKENS),
        chat_template_kwargs={"enable_thinking": False},
    )
    return [
        {
            "prompt_ids": output.prompt_token_ids,
            "ids": list(output.outputs[0].token_ids),
            "text": output.outputs[0].text,
            "best": [best_tokens(log_probs) for log_probs in output.outputs[0].logprobs],
        }
        for output in outputs
    ]


def main(model: str, request_file: str, response_file: str, linears_file: str = "") -> None:
    with open(request_file) as file:
        request = json.load(file)
    register_emulation_kernels()
    longest = max([CHAT_TOKENS, *(len(ids) for ids in request["prompts"])])
    engine = LLM(
        model, enforce_eager=True, dtype="bfloat16", seed=0, max_model_len=longest + request["max_tokens"] + 16
    )
    recorder = Recorder()
    if linears_file:
        engine.apply_model(recorder.attach)
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in request["prompts"]],
        SamplingParams(temperature=0, max_tokens=request["max_tokens"], prompt_logprobs=1),
    )
    response = []
    for ids, output in zip(request["prompts"], outputs, strict=True):
        log_probs = [None] + [output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]
        response.append({"log_probs": log_probs, "text": output.outputs[0].text})
    images = captions(engine, request["images"], request["max_tokens"])
    with open(response_file, "w") as file:
        json.dump({"prompts": response, "images": images}, file)
    if linears_file:
        save_file(recorder.seen, linears_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
