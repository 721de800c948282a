#!/usr/bin/env python3
"""Formats that the published PrismaQuant (the Python package prismaquant) chooses for each Linear, on a CPU.

usage: upstream.py SOURCE --work DIR --calibration TEXT
       upstream.py SOURCE --work DIR --choose CHOICES.json --bpp 5.5 --formats NVFP4,FP8_DYNAMIC,BF16

The first runs the package's probe and its measurement of rounding costs, the second its allocator. The probe and the measurement refuse to
run without CUDA; the function that refuses is answered "cpu" here. CHOICES.json is {Linear: format}.
"""
import argparse
import json
import pathlib
import runpy
import sys

import torch
from evaluate import text_windows
from prismaquant import gpu_guard
from prismaquant.layer_config import load_assignment
from transformers import AutoTokenizer

MEASURED = "NVFP4,FP8_DYNAMIC,MXFP8,BF16"
SCHEMES = {"MXFP8_E4M3": "MXFP8", "FP8_E4M3": "FP8_DYNAMIC"}  # llm-compressor's names
AS_QWEN3 = ("llama", "mistral")  # not registered there; the same names of Linears, fused in the same way


def run(module: str, *arguments: object) -> None:
    sys.argv = [f"prismaquant.{module}", *map(str, arguments)]
    try:
        runpy.run_module(f"prismaquant.{module}", run_name="__main__", alter_sys=True)
    except SystemExit as stopped:
        if stopped.code:
            raise


def write_calibration(path: pathlib.Path, source: pathlib.Path, windows: torch.Tensor) -> None:
    """One record for each window; the probe tokenizes it again."""
    tokenizer = AutoTokenizer.from_pretrained(source)
    path.write_text("".join(json.dumps({"text": tokenizer.decode(window)}) + "\n" for window in windows))


def profile_model(work: pathlib.Path, source: pathlib.Path) -> pathlib.Path:
    """The folder whose config.json tells the allocator what is fused: the source, or one that calls it a Qwen3."""
    config = json.loads((source / "config.json").read_text())
    if config["model_type"] not in AS_QWEN3:
        return source
    folder = work / "as_qwen3"
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}))
    return folder


def layer_count(source: pathlib.Path) -> int:
    config = json.loads((source / "config.json").read_text())
    return config.get("text_config", config)["num_hidden_layers"]


def measure(arguments: argparse.Namespace, work: pathlib.Path) -> None:
    work.mkdir(parents=True, exist_ok=True)
    windows = text_windows(arguments.source, arguments.calibration, arguments.samples, arguments.tokens)
    write_calibration(work / "calibration.jsonl", arguments.source, windows)
    # All layers in one part: the automatic choice keeps 20 GB of memory free and goes through the model once a layer.
    common = ["--model", arguments.source, "--activation-cache-dir", work / "activations", "--work-dir", work / "parts",
              "--layers-per-shard", layer_count(arguments.source), "--device", "cpu", "--no-include-visual", "--no-include-mtp",
              "--no-include-lm-head"]
    run("incremental_probe", *common, "--dataset", work / "calibration.jsonl", "--nsamples", arguments.samples,
        "--seqlen", arguments.tokens, "--output", work / "probe.pkl")
    run("incremental_measure_quant_cost", *common, "--cost-mode", "local", "--probe", work / "probe.pkl", "--formats", MEASURED,
        "--mode", "batched", "--skip-missing-activations", "--output", work / "costs.pkl")


def choose(arguments: argparse.Namespace, work: pathlib.Path) -> dict[str, str]:
    layer_config = arguments.choose.with_suffix(".layer_config")
    run("allocator", "--probe", work / "probe.pkl", "--costs", work / "costs.pkl", "--target-bits", arguments.bpp,
        "--formats", arguments.formats, "--model-override", profile_model(work, arguments.source),
        "--layer-config", layer_config, "--pareto-csv", layer_config.with_suffix(".csv"))
    return {linear: SCHEMES.get(name, name) for linear, name in load_assignment(layer_config).items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("--work", type=pathlib.Path, required=True)
    parser.add_argument("--calibration", type=pathlib.Path)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--choose", type=pathlib.Path, metavar="CHOICES")
    parser.add_argument("--bpp", type=float)
    parser.add_argument("--formats")
    arguments = parser.parse_args()
    gpu_guard.require_cuda_hot_path = lambda component, device="cuda": torch.device("cpu")
    work = arguments.work.resolve()
    if arguments.choose:
        arguments.choose.write_text(json.dumps(choose(arguments, work), indent=1))
    else:
        measure(arguments, work)


if __name__ == "__main__":
    main()
