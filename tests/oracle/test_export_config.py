"""What transformers' two classes make of an exported multimodal checkpoint, and what verify and inspect say of it."""

import json
import os
import pathlib
import shutil
import subprocess

import pytest
import torch
import transformers

from reference_models import bundled_model
from stored import decode, tensors

COMPRESSION = {"nvfp4": "nvfp4-pack-quantized", "fp8": "float-quantized", "mxfp8": "mxfp8-quantized"}


def prismaquant(*arguments) -> subprocess.CompletedProcess:
    command = [os.environ["PRISMAQUANT_BINARY"], *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


def expected_format(module: str) -> str:
    if module.endswith(("in_proj_a", "in_proj_b")):
        return "bf16"
    if "self_attn" in module:
        return "mxfp8"
    return "fp8" if module.endswith("out_proj") else "nvfp4"


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("export")
    source = bundled_model()
    done = prismaquant(
        "quantize", source, folder / "out", "--work", folder / "work", "--uniform", "nvfp4",
        "--pin", "self_attn=mxfp8", "--pin", "linear_attn.out_proj=fp8", "--kernels", "any",
        "--calibration", source / "calibration.txt", "--samples", 2, "--tokens", 32,
        "--render", "rtn", "--no-eval",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return folder / "out"


@pytest.fixture(scope="module")
def stored(exported) -> dict:
    return tensors(exported)


@pytest.mark.parametrize(
    "loader, body",
    [
        (transformers.AutoModelForImageTextToText, "model.language_model."),
        (transformers.AutoModelForCausalLM, "model."),
    ],
)
def test_both_classes_load_every_linear_in_its_format(exported, stored, loader, body):
    model, report = loader.from_pretrained(exported, dtype=torch.bfloat16, output_loading_info=True)
    assert not any(report[key] for key in report), report
    schemes = {
        name: module.quantization_scheme.format.value
        for name, module in model.named_modules()
        if getattr(module, "quantization_scheme", None) is not None
    }
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3, 4]]))  # the first forward pass decompresses

    linears = [
        (name, module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)
    ]
    quantized = 0
    for name, module in linears:
        in_body = name.startswith(body + "layers.")
        original = "model.language_model." + name.removeprefix(body) if in_body else name
        found, weight = decode(stored, original)
        assert found == (expected_format(original) if in_body else "bf16"), name
        assert schemes.get(name) == COMPRESSION.get(found), name
        quantized += found != "bf16"
        error = (module.weight.float() - weight).abs().max() / weight.abs().max()
        assert error <= 2**-8, name  # decompression multiplies in bfloat16
    assert quantized == len(schemes) > 0


def test_verify_accepts_the_export_and_names_damage(exported, tmp_path):
    source = bundled_model()
    assert prismaquant("verify", exported, "--source", source).returncode == 0
    assert prismaquant("verify", source).returncode == 0
    assert prismaquant("verify", tmp_path / "missing").returncode == 2

    damaged = shutil.copytree(exported, tmp_path / "damaged")
    config = json.loads((damaged / "config.json").read_text())
    group = config["quantization_config"]["config_groups"]["group_0"]
    lost = group["targets"].pop(0)
    (damaged / "config.json").write_text(json.dumps(config))
    done = prismaquant("verify", damaged)
    assert done.returncode == 1
    assert lost in done.stderr and done.stderr.count("\n") == 1

    shard = next(damaged.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    done = prismaquant("verify", damaged)
    assert done.returncode == 1 and shard.name in done.stderr


def test_inspect_counts_what_is_stored(exported, stored):
    done = prismaquant("inspect", exported, "--json", "-")
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout)
    assert summary["bytes"] == sum(file.stat().st_size for file in exported.glob("*.safetensors"))
    source = json.loads(prismaquant("inspect", bundled_model(), "--json", "-").stdout)
    assert summary["parameters"] == source["parameters"]
    assert source["bpp"] == 16

    modules = {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}
    for name in COMPRESSION:
        members = [module for module in modules if expected_format(module) == name]
        totals = summary["formats"][name]
        assert totals["linears"] == len(members) > 0
        assert totals["weights"] == sum(decode(stored, module)[1].numel() for module in members)
        assert totals["bytes"] == sum(
            tensor.nbytes for key, tensor in stored.items() if key.rpartition(".")[0] in members
        )
