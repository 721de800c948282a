"""Prompt log-probabilities and greedy continuations from the real vLLM on a CPU.

usage: serve.py MODEL_DIR REQUEST.json RESPONSE.json

REQUEST: {"prompts": [[token id, ...], ...], "max_tokens": n}.
RESPONSE: a list in the same order of {"log_probs": [null, log p of token 1 given token 0, ...] in nats,
"text": the continuation}.

vLLM lists no NVFP4 or MXFP8 kernel for CPUs; its own emulation kernels, which quantize activations as a GPU does, are
registered here. Loading, name mapping, fusing and the choice of schemes are vLLM's.
"""

import json
import os
import sys

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm.model_executor.kernels.linear as kernels
from vllm import LLM, SamplingParams
from vllm.platforms import PlatformEnum


def register_emulation_kernels() -> None:
    for table, kernel in (
        (kernels._POSSIBLE_NVFP4_KERNELS, kernels.EmulationNvFp4LinearKernel),
        (kernels._POSSIBLE_MXFP8_KERNELS, kernels.EmulationMxfp8LinearKernel),
    ):
        table.setdefault(PlatformEnum.CPU, []).append(kernel)


def main(model: str, request_file: str, response_file: str) -> None:
    with open(request_file) as file:
        request = json.load(file)
    register_emulation_kernels()
    longest = max(len(ids) for ids in request["prompts"])
    engine = LLM(
        model, enforce_eager=True, dtype="bfloat16", seed=0, max_model_len=longest + request["max_tokens"] + 16
    )
    outputs = engine.generate(
        [{"prompt_token_ids": ids} for ids in request["prompts"]],
        SamplingParams(temperature=0, max_tokens=request["max_tokens"], prompt_logprobs=1),
    )
    response = []
    for ids, output in zip(request["prompts"], outputs, strict=True):
        log_probs = [None] + [output.prompt_logprobs[i][ids[i]].logprob for i in range(1, len(ids))]
        response.append({"log_probs": log_probs, "text": output.outputs[0].text})
    with open(response_file, "w") as file:
        json.dump(response, file)


if __name__ == "__main__":
    main(*sys.argv[1:])
