"""A smoothed model is the same function in other tensors, as transformers computes both."""

import json
import os
import pathlib
import subprocess

import pytest
import torch
from reference_models import bundled_model, load_model, random_ids
from safetensors.torch import load_file
from test_families import CASES, family_source, quantize, stored

PROGRAM = os.environ["PRISMAQUANT_BINARY"]
MIXTURE = pathlib.Path(os.environ["PRISMAQUANT_SOURCE_DIR"]) / "examples" / "tiny-qwen3_5_moe"
# Their norms multiply by 1 + w, whose rounding shows in the weights behind them.
ROUNDED = {"gemma3_text", "gemma3", "qwen3_5_text"}


@pytest.fixture(scope="module", params=CASES)
def family(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def source(family, tmp_path_factory) -> pathlib.Path:
    return family_source(family, tmp_path_factory.mktemp("source") / "model")


def verify(out: pathlib.Path, source: pathlib.Path) -> subprocess.CompletedProcess:
    return subprocess.run([PROGRAM, "verify", out, "--source", source], capture_output=True, text=True)


def changed(source: pathlib.Path, out: pathlib.Path) -> set[str]:
    before, after = stored(source), stored(out)
    assert before.keys() == after.keys()
    return {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}


@torch.no_grad()
def test_the_function_stays(family, source, tmp_path):
    out = quantize(source, tmp_path / "out", "--uniform", "bf16", "--smooth")
    names = changed(source, out)
    assert any("layernorm" in name for name in names) and any("up_proj" in name for name in names)
    ids = random_ids({"config": CASES[family]["config"]}, 2, 40)
    logits = [load_model(folder, torch.float32)(input_ids=ids, use_cache=False).logits for folder in (source, out)]
    error = (logits[1] - logits[0]).square().mean().sqrt() / logits[0].std()
    assert error <= (2e-2 if family in ROUNDED else 1e-6), error
    assert verify(out, source).returncode == 0


def test_quantized_checkpoints_verify(source, tmp_path):
    out = quantize(source, tmp_path / "out", "--bpp", "6", "--smooth")
    done = verify(out, source)
    assert done.returncode == 0, done.stderr
    # Without the record the norms are just wrong.
    (out / "prismaquant.json").unlink()
    done = verify(out, source)
    assert done.returncode == 1 and "expected a copy" in done.stderr


@pytest.mark.parametrize("source", [bundled_model(), MIXTURE], ids=["dense", "mixture"])
def test_all_parts_keep_their_function(source, tmp_path):
    """Text, captions through the vision tower, and the MTP head's drafts, measured against the source itself."""
    done = subprocess.run([PROGRAM, "quantize", source, tmp_path / "out", "--calibration", bundled_model() / "calibration.txt",
                           "--samples", "4", "--tokens", "64", "--images", bundled_model() / "samples", "--precision", "float32",
                           "--eval-tokens", "1024", "--uniform", "bf16", "--smooth", "--json", "-"],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)["evaluation"]
    assert found["kl"] < 2e-5 and found["captions"]["kl"] < 2e-5
    assert found["mtp"]["acceptance"] == pytest.approx(found["mtp"]["acceptance_source"], abs=0.01)
    names = changed(source, tmp_path / "out")
    for part in ("visual.blocks.0.norm1.bias", "visual.blocks.0.attn.qkv.bias", "visual.merger.linear_fc1.weight", "linear_attn.norm.weight",
                 "self_attn.v_proj.weight", "mtp.layers.0"):  # fmt: skip
        assert any(part in name for name in names), part
    if source == MIXTURE:
        assert any("experts.gate_up_proj" in name for name in names)
    assert verify(tmp_path / "out", source).returncode == 0


def test_single_experts_among_packed_ones(tmp_path):
    out = quantize(MIXTURE, tmp_path / "out", "--bpp", "5.5", "--smooth")
    assert verify(out, MIXTURE).returncode == 0


def test_a_smoothed_run_goes_on_from_its_store(tmp_path):
    source = bundled_model()
    text = source / "calibration.txt"
    calibration = ["--calibration", text, "--samples", "3", "--tokens", "64", "--precision", "float32"]

    def run(*arguments, expect=0) -> str:
        done = subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True)
        assert done.returncode == expect, done.stderr
        return done.stderr

    run("quantize", source, tmp_path / "whole", *calibration, "--bpp", "5", "--smooth", "--no-eval")
    run("probe", source, "--work", tmp_path / "work", *calibration, "--smooth")
    run("export", "--work", tmp_path / "work", tmp_path / "resumed", "--bpp", "5")
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(tensor.view(torch.uint8), resumed[name].view(torch.uint8)) for name, tensor in whole.items())
    # A store of smoothed costs is of no use to a plain run.
    assert "smooth" in run("probe", source, "--work", tmp_path / "work", *calibration, expect=2)
