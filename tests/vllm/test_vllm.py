"""Checkpoints as the real vLLM reads them: it serves them, and means by their bytes what `evaluate` measures.

Linear by Linear: vLLM's output for its own input is that of the stored bytes and of the format's activation quantizer,
up to bfloat16. A tensor read wrongly, a scheme given to the wrong Linear or an activation left unquantized shows.

End to end the distance of two log-probabilities has a floor: a rounding difference flips a few codes of quantized
activations, and the flips spread from layer to layer. `evaluate` in bfloat16 is as far from itself in float32. vLLM
may be no farther from `evaluate` than that.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

sys.path.append(str(pathlib.Path(__file__).parents[1] / "oracle"))
from stored import decode, round_to_e2m1, tensors  # noqa: E402

BINARY = os.environ["PRISMAQUANT_BINARY"]
SOURCE_DIR = pathlib.Path(os.environ["PRISMAQUANT_SOURCE_DIR"])
TINY = SOURCE_DIR / "examples/tiny-qwen3_5"
SMOLLM2 = pathlib.Path(os.environ["PRISMAQUANT_SMOLLM2"])
HELD_OUT = TINY / "heldout.txt"
TOKENS = 512
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
}


def prismaquant(*arguments) -> str:
    done = subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def quantize(source: pathlib.Path, out: pathlib.Path, *options) -> pathlib.Path:
    prismaquant("quantize", source, out, "--calibration", TINY / "calibration.txt", "--samples", 16, "--tokens", 256,
                "--no-eval", *options)
    return out


def serve(model: pathlib.Path, prompts: list[list[int]], max_tokens: int, folder: pathlib.Path) -> list[dict]:
    """serve.py in a process of its own, since one process holds one engine; leaves linears.safetensors in `folder`."""
    request, response = folder / "request.json", folder / "response.json"
    request.write_text(json.dumps({"prompts": prompts, "max_tokens": max_tokens}))
    done = subprocess.run([sys.executable, pathlib.Path(__file__).with_name("serve.py"), model, request, response,
                           folder / "linears.safetensors"], capture_output=True, text=True)
    assert done.returncode == 0, f"vLLM on {model}: exit {done.returncode}\n{done.stderr[-4000:]}"
    return json.loads(response.read_text())


def token_ids(model: pathlib.Path, text: str, folder: pathlib.Path) -> list[int]:
    file = folder / "prompt.txt"
    file.write_text(text)
    return json.loads(prismaquant("tokenize", model, "--text", file))


def evaluated(source: pathlib.Path, out: pathlib.Path, folder: pathlib.Path, precision: str) -> dict:
    """The one window of TOKENS tokens, with the log-probabilities of source and quantized model."""
    file = folder / f"log_probs_{precision}.json"
    prismaquant("evaluate", source, out, "--text", HELD_OUT, "--precision", precision, "--eval-tokens", TOKENS,
                "--token-logprobs", file)
    record = json.loads(file.read_text())
    assert record["schema"] == 1 and len(record["windows"]) == 1
    return record["windows"][0]


def mean_distance(left: list[float], right: list[float]) -> float:
    assert len(left) == len(right) >= 500
    return sum(abs(a - b) for a, b in zip(left, right)) / len(left)


def check_log_probs(source: pathlib.Path, out: pathlib.Path, served: dict, folder: pathlib.Path) -> None:
    rounded, exact = (evaluated(source, out, folder, precision) for precision in ("bf16", "float32"))
    floor = mean_distance(rounded["quantized"], exact["quantized"])
    apart = mean_distance(served["log_probs"][1:], rounded["quantized"])
    moved = mean_distance(exact["quantized"], exact["source"])
    print(f"vLLM against evaluate {apart:.5f}, evaluate in bf16 against float32 {floor:.5f}, "
          f"quantized against source {moved:.5f} nats")
    assert moved > 0.001
    assert apart <= 1.25 * floor
    mean = sum(a - b for a, b in zip(served["log_probs"][1:], exact["quantized"])) / len(exact["quantized"])
    assert abs(mean) <= 0.25 * moved


def members(layer: str) -> list[str]:
    """The checkpoint's Linears behind a layer of vLLM."""
    parent, _, leaf = layer.replace("language_model.model.", "model.language_model.").rpartition(".")
    return [f"{parent}.{name}" for name in FUSED.get(leaf, [leaf])]


def quantize_input(stored: dict, linear: str, name: str, x: torch.Tensor) -> torch.Tensor:
    """What vLLM's kernels on a CPU make of an input [tokens, in]: in float32, rounding where they round."""
    x = x.float()
    if name == "fp8":
        scale = x.abs().amax(-1, keepdim=True) / 448
        return (x / scale).to(torch.float8_e4m3fn).float() * scale
    if name == "nvfp4":
        global_scale = stored[linear + ".input_global_scale"]
        groups = x.unflatten(-1, (-1, 16))
        scale = global_scale * (groups.abs().amax(-1, keepdim=True) * (1 / torch.tensor(6.0)))
        scale = scale.clamp(max=448).to(torch.float8_e4m3fn).float()
        inverse = 1 / (scale * (1 / global_scale))
        scaled = (groups * inverse.where(scale > 0, 0)).clamp(-6, 6)
        return (round_to_e2m1(scaled) * (scale / global_scale)).flatten(-2)
    return x


def check_linears(out: pathlib.Path, folder: pathlib.Path) -> None:
    stored, seen = tensors(out), load_file(folder / "linears.safetensors")
    layers = {name.rpartition(".")[0] for name in seen}
    quantized = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    assert quantized == {linear for layer in layers for linear in members(layer)}
    worst = 0.0
    for layer in layers:
        x, y = seen[layer + ".input"], seen[layer + ".output"].float()
        decoded = [decode(stored, linear) for linear in members(layer)]
        weight = torch.cat([w for _, w in decoded])
        expected = quantize_input(stored, members(layer)[0], decoded[0][0], x) @ weight.T
        error = ((y - expected).norm() / expected.norm()).item()
        worst = max(worst, error)
        assert error <= 0.01, f"{layer} ({decoded[0][0]}): relative error {error:.4f}"
    print(f"{len(layers)} layers, largest relative error of an output {worst:.5f}")


@pytest.mark.parametrize("preset", [[], ["--preset", "published", "--kernels", "any"]], ids=["default", "published"])
def test_smollm2_continues_and_agrees_with_evaluate(tmp_path, preset):
    out = quantize(SMOLLM2, tmp_path / "out", "--bpp", "6.0", *preset)
    ids = evaluated(SMOLLM2, out, tmp_path, "bf16")["ids"]
    france = token_ids(SMOLLM2, "The capital of France is", tmp_path)
    served = serve(out, [ids, france], 2, tmp_path)
    assert served[1]["text"].startswith(" Paris")
    check_linears(out, tmp_path)
    check_log_probs(SMOLLM2, out, served[0], tmp_path)


def test_tiny_qwen3_5_agrees_with_evaluate(tmp_path):
    out = quantize(TINY, tmp_path / "out", "--bpp", "5.5")
    ids = evaluated(TINY, out, tmp_path, "bf16")["ids"]
    (served,) = serve(out, [ids], 1, tmp_path)
    check_linears(out, tmp_path)
    check_log_probs(TINY, out, served, tmp_path)
