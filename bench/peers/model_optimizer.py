#!/usr/bin/env python3
"""NVIDIA's modelopt chooses between NVFP4, MXFP8 and no quantization by auto_quantize; prints one JSON object as evaluate.py does.

usage: model_optimizer.py SOURCE --bpp 5.5 --calibration TEXT --scores FILE [--stored-bits] [--text TEXT]

modelopt quantizes fake, in memory, and is measured there: there is no checkpoint. Its block quantizer exists for CUDA alone; a stand-in
with the same arithmetic takes its place here. It counts MXFP8 as 8 bits, so that its result is larger than the budget; --stored-bits
has it count the 8.25 bits that MXFP8 takes. FILE keeps the scores for other budgets; without TEXT nothing is measured. "resources" are those of the
search, without importing the libraries and measuring.
"""
import argparse
import copy
import json
import pathlib
import resource
import time

import modelopt.torch.quantization as mtq
import torch
from evaluate import WINDOW, compare, load_model, reference, text_linears, text_windows
from modelopt.torch.quantization import tensor_quant

SCORED_BATCHES = 4
STORED_BITS = {"nvfp4": 4.5, "mxfp8": 8.25, "bf16": 16.0}
GLOBAL_SCALE_BITS = {"nvfp4": 64, "mxfp8": 0, "bf16": 0}  # per Linear: the scales of weight and input


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6, ties to the even code; the step between values depends on the binade."""
    magnitude = x.abs().clamp(max=6)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return ((magnitude / step).round() * step).copysign(x)


@torch.no_grad()
def quantize_blocks(inputs: torch.Tensor, block: int, amax: torch.Tensor | None, bits: int, exponent_bits: int,
                    scale_bits: int, scale_exponent_bits: int) -> torch.Tensor:
    """Stands in for modelopt's CUDA kernel: E2M1 under an E4M3 scale relative to amax, or E4M3 under a power of two, rounded up."""
    x = inputs.float().unflatten(-1, (-1, block))
    largest = x.abs().amax(-1, keepdim=True)
    if (bits, exponent_bits, scale_exponent_bits) == (4, 2, 4):
        unit = amax.float().amax() / (6 * 448)
        scale = (largest / 6 / unit).clamp(max=448).to(torch.float8_e4m3fn).float() * unit
        scale = torch.where(scale < 1e-5, 1.0, scale)
        y = round_to_e2m1(x / scale) * scale
    elif (bits, exponent_bits, scale_exponent_bits) == (8, 4, 8):
        scale = torch.exp2((largest / 448).log2().ceil().clamp(-127, 127))
        y = (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale
    else:
        raise NotImplementedError(f"{bits} bits, {exponent_bits} of them exponent, under {scale_bits} bits of scale")
    return y.flatten(-2).to(inputs.dtype)


def formats_of(model: torch.nn.Module) -> dict[str, str]:
    """What the search chose for each Linear of the text."""
    kinds = {(2, 1): "nvfp4", (4, 3): "mxfp8"}
    return {name: kinds[module.weight_quantizer.num_bits] if module.weight_quantizer.is_enabled else "bf16"
            for name, module in text_linears(model).items()}


def sizes(model: torch.nn.Module) -> dict:
    """Bits per weight that a checkpoint of these formats would have."""
    chosen, linears = formats_of(model), text_linears(model)
    bits = sum(STORED_BITS[chosen[name]] * module.weight.numel() + GLOBAL_SCALE_BITS[chosen[name]] for name, module in linears.items())
    counts = {name: list(chosen.values()).count(name) for name in STORED_BITS}
    return {"file_bytes": None, "linear_bytes": round(bits / 8), "bpp": bits / sum(module.weight.numel() for module in linears.values()),
            "formats": {name: count for name, count in counts.items() if count}}


def search(model: torch.nn.Module, windows: torch.Tensor, bpp: float, stored_bits: bool, scores: pathlib.Path) -> torch.nn.Module:
    counted = text_linears(model).keys()
    others = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and name not in counted]
    mxfp8 = copy.deepcopy(mtq.MXFP8_DEFAULT_CFG)
    if stored_bits:
        mxfp8["effective_bits"] = STORED_BITS["mxfp8"]
    found, _ = mtq.auto_quantize(
        model, constraints={"effective_bits": bpp, "cost": {"excluded_module_name_patterns": others}},
        quantization_formats=[copy.deepcopy(mtq.NVFP4_DEFAULT_CFG), mxfp8], data_loader=[window[None] for window in windows],
        forward_step=lambda network, batch: network(input_ids=batch, labels=batch, use_cache=False),
        loss_func=lambda output, batch: output.loss, disabled_layers=others, num_calib_steps=len(windows),
        num_score_steps=min(SCORED_BATCHES, len(windows)), verbose=False, checkpoint=str(scores))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("--bpp", type=float, required=True)
    parser.add_argument("--stored-bits", action="store_true")
    parser.add_argument("--calibration", type=pathlib.Path, required=True)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--scores", type=pathlib.Path, required=True)
    parser.add_argument("--text", type=pathlib.Path)
    parser.add_argument("--eval-tokens", type=int, default=4096)
    parser.add_argument("--reference", type=pathlib.Path)
    arguments = parser.parse_args()
    tensor_quant.dynamic_block_quantize_op = quantize_blocks
    begin, begin_cpu = time.monotonic(), time.process_time()
    windows = text_windows(arguments.source, arguments.calibration, arguments.samples, arguments.tokens)
    model = search(load_model(arguments.source, torch.float32), windows, arguments.bpp, arguments.stored_bits,
                   arguments.scores)
    resources = {"wall_s": time.monotonic() - begin, "cpu_s": time.process_time() - begin_cpu,
                 "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    if arguments.text is None:
        return
    size = sizes(model)
    mtq.fold_weight(model)
    held_out = text_windows(arguments.source, arguments.text, arguments.eval_tokens // WINDOW)
    measured = compare(reference(arguments.source, held_out, arguments.reference), model.eval(), held_out)
    print(json.dumps({**size, **measured, "resources": resources}))


if __name__ == "__main__":
    main()
