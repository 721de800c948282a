"""Checkpoints as the real vLLM reads them: it serves them, and means by their bytes what `evaluate` measures.

The measure is the log-probability of every token of a held-out text. Quantization moves it by some mean |delta|; vLLM
and `evaluate --precision bf16` may differ by a quarter of that at most, so that a tensor read wrongly, a scheme given
to the wrong Linear or an activation left unquantized shows.
"""

import json
import os
import pathlib
import subprocess
import sys

import pytest

BINARY = os.environ["PRISMAQUANT_BINARY"]
SOURCE_DIR = pathlib.Path(os.environ["PRISMAQUANT_SOURCE_DIR"])
TINY = SOURCE_DIR / "examples/tiny-qwen3_5"
SMOLLM2 = pathlib.Path(os.environ["PRISMAQUANT_SMOLLM2"])
HELD_OUT = TINY / "heldout.txt"
TOKENS = 512
SHARE = 0.25


def prismaquant(*arguments) -> str:
    done = subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def quantize(source: pathlib.Path, out: pathlib.Path, *options) -> pathlib.Path:
    prismaquant("quantize", source, out, "--calibration", TINY / "calibration.txt", "--samples", 16, "--tokens", 256,
                "--no-eval", *options)
    return out


def serve(model: pathlib.Path, prompts: list[list[int]], max_tokens: int, folder: pathlib.Path) -> list[dict]:
    """serve.py in a process of its own, since one process holds one engine."""
    request, response = folder / "request.json", folder / "response.json"
    request.write_text(json.dumps({"prompts": prompts, "max_tokens": max_tokens}))
    done = subprocess.run([sys.executable, pathlib.Path(__file__).with_name("serve.py"), model, request, response],
                          capture_output=True, text=True)
    assert done.returncode == 0, f"vLLM on {model}: exit {done.returncode}\n{done.stderr[-4000:]}"
    return json.loads(response.read_text())


def token_ids(model: pathlib.Path, text: str, folder: pathlib.Path) -> list[int]:
    file = folder / "prompt.txt"
    file.write_text(text)
    return json.loads(prismaquant("tokenize", model, "--text", file))


def evaluated(source: pathlib.Path, out: pathlib.Path, folder: pathlib.Path) -> dict:
    """The one window of TOKENS tokens, with the log-probabilities of source and quantized model."""
    file = folder / "log_probs.json"
    prismaquant("evaluate", source, out, "--text", HELD_OUT, "--precision", "bf16", "--eval-tokens", TOKENS,
                "--token-logprobs", file)
    record = json.loads(file.read_text())
    assert record["schema"] == 1 and len(record["windows"]) == 1
    return record["windows"][0]


def mean_distance(left: list[float], right: list[float]) -> float:
    assert len(left) == len(right) >= 500
    return sum(abs(a - b) for a, b in zip(left, right)) / len(left)


def positions_from_one(values: list, ids: list[int]) -> list[float]:
    """Drops what stands for position 0, which has no prediction, if the file writes it."""
    return values[len(values) - (len(ids) - 1):]


def check_log_probs(window: dict, served: dict, name: str) -> None:
    ids = window["ids"]
    source, quantized = (positions_from_one(window[key], ids) for key in ("source", "quantized"))
    moved = mean_distance(quantized, source)
    apart = mean_distance(quantized, served["log_probs"][1:])
    print(f"{name}: vLLM against evaluate {apart:.5f}, quantized against source {moved:.5f} nats")
    assert moved > 0.001
    assert apart <= SHARE * moved


@pytest.mark.parametrize("preset", [[], ["--preset", "published", "--kernels", "any"]], ids=["default", "published"])
def test_smollm2_continues_and_agrees_with_evaluate(tmp_path, preset):
    out = quantize(SMOLLM2, tmp_path / "out", "--bpp", "6.0", *preset)
    window = evaluated(SMOLLM2, out, tmp_path)
    france = token_ids(SMOLLM2, "The capital of France is", tmp_path)
    served = serve(out, [window["ids"], france], 2, tmp_path)
    assert served[1]["text"].startswith(" Paris")
    check_log_probs(window, served[0], f"SmolLM2 {' '.join(preset) or 'default'}")


def test_tiny_qwen3_5_agrees_with_evaluate(tmp_path):
    out = quantize(TINY, tmp_path / "out", "--bpp", "5.5")
    window = evaluated(TINY, out, tmp_path)
    (served,) = serve(out, [window["ids"]], 1, tmp_path)
    check_log_probs(window, served, "tiny-qwen3_5")
