#!/usr/bin/env python3
"""Quantizes a checkpoint with llm-compressor: one scheme for every Linear of the text, or a choice for each.

usage: llm_compressor.py SOURCE OUT --calibration TEXT (--scheme NVFP4 [--gptq] | --choices FILE)

FILE is a JSON object {Linear: scheme}; Linears that it gives BF16, or does not name, stay as they are. All other settings are the
library's defaults, but that rounding to nearest takes its activation maxima in one pass over the unquantized model (pipeline "basic").
"""
import argparse
import json
import pathlib
import re

import torch
import transformers
from datasets import Dataset
from evaluate import load_model, text_linears, text_windows
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier

WITHOUT_DATA = ("MXFP8", "FP8_DYNAMIC")


def recipe(choices: dict[str, str], gptq: bool) -> list:
    """One modifier for each scheme that is chosen."""
    modifier = GPTQModifier if gptq else QuantizationModifier
    targets: dict[str, list[str]] = {}
    for linear, scheme in choices.items():
        if scheme != "BF16":
            targets.setdefault(scheme, []).append(f"re:^{re.escape(linear)}$")
    return [modifier(targets=names, scheme=scheme) for scheme, names in sorted(targets.items())]


def calibration(windows: torch.Tensor) -> Dataset:
    return Dataset.from_dict({"input_ids": windows.tolist(), "attention_mask": torch.ones_like(windows).tolist()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("out", type=pathlib.Path)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--scheme")
    what.add_argument("--choices", type=pathlib.Path)
    parser.add_argument("--gptq", action="store_true")
    parser.add_argument("--calibration", type=pathlib.Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    arguments = parser.parse_args()
    model = load_model(arguments.source, "auto")
    linears = text_linears(model)
    choices = json.loads(arguments.choices.read_text()) if arguments.choices else dict.fromkeys(linears, arguments.scheme)
    if unknown := choices.keys() - linears.keys():
        raise KeyError(f"{arguments.choices}: the model has no Linear {min(unknown)}")
    data = {}
    if arguments.gptq or not set(choices.values()) <= {"BF16", *WITHOUT_DATA}:
        windows = text_windows(arguments.source, arguments.calibration, arguments.samples, arguments.tokens)
        data = {"dataset": calibration(windows), "num_calibration_samples": arguments.samples,
                "max_seq_length": arguments.tokens, "shuffle_calibration_samples": False}
        if not arguments.gptq:
            data["pipeline"] = "basic"
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.source)
    oneshot(model=model, tokenizer=tokenizer, recipe=recipe(choices, arguments.gptq), **data)
    model.save_pretrained(arguments.out, save_compressed=True)
    tokenizer.save_pretrained(arguments.out)


if __name__ == "__main__":
    main()
