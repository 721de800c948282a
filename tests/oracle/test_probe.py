"""The probe's statistics against transformers' autograd, with rounding errors by the formats' definitions.

Data labels make the loss a function of the text alone, so every number has one right value.
"""

import json
import os
import subprocess

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import Qwen3_5ForConditionalGeneration

from reference_models import bundled_model
from stored import round_to_e2m1

PROGRAM = os.environ["PRISMAQUANT_BINARY"]
FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_qkv", "in_proj_z")]
OPTIONS = ["--calibration", bundled_model() / "calibration.txt", "--samples", "5", "--tokens", "48", "--labels", "data",
           "--precision", "float32"]


def probe(work, *extra) -> dict:
    done = subprocess.run([PROGRAM, "probe", bundled_model(), "--work", work, *OPTIONS, "--json", "-", *extra],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("probe") / "work"


@pytest.fixture(scope="module")
def found(work) -> dict:
    return probe(work)


def nvfp4(x: torch.Tensor, amax: float) -> torch.Tensor:
    """Rounded to nearest under the global scale of `amax`, and decoded."""
    global_scale = torch.tensor(2688.0) / amax
    groups = x.unflatten(-1, (-1, 16))
    scale = (global_scale * (groups.abs().amax(-1, keepdim=True) / 6)).clamp(max=448).to(torch.float8_e4m3fn).float()
    scale = scale.where(scale > 0, 0.125) / global_scale
    return (round_to_e2m1((groups / scale).clamp(-6, 6)) * scale).flatten(-2)


def mxfp8(x: torch.Tensor) -> torch.Tensor:
    groups = x.unflatten(-1, (-1, 32))
    amax = groups.abs().amax(-1, keepdim=True)
    exponent = torch.floor(torch.log2(amax))
    exponent = torch.where(amax >= 1.75 * torch.exp2(exponent), exponent + 1, exponent)
    scale = torch.exp2(exponent - 8)
    return ((groups / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale).flatten(-2)


def fp8(x: torch.Tensor, scale_type=torch.float32) -> torch.Tensor:
    scale = (x.abs().amax(-1, keepdim=True) / 448).to(scale_type).float()
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


def rounded(name: str, weight, weight_amax: float, x, input_amax: float):
    if name == "nvfp4":
        return nvfp4(weight, weight_amax), nvfp4(x, input_amax)
    if name == "fp8":
        return fp8(weight, torch.bfloat16), fp8(x)
    if name == "mxfp8":
        return mxfp8(weight), mxfp8(x)
    return weight, x


class Reference:
    """Inputs and output gradients of every Linear of the body, per calibration sequence."""

    def __init__(self, windows: torch.Tensor):
        model = Qwen3_5ForConditionalGeneration.from_pretrained(bundled_model(), dtype=torch.float32).eval()
        self.linears = {
            name: module for name, module in model.named_modules()
            if isinstance(module, torch.nn.Linear) and ".language_model.layers." in name
        }  # fmt: skip
        self.weights = {name: module.weight.detach() for name, module in self.linears.items()}
        self.x = {name: [] for name in self.linears}
        self.g = {name: [] for name in self.linears}
        for name, module in self.linears.items():
            module.register_forward_hook(self._keep(name))
        for ids in windows:
            logits = model(input_ids=ids[None].long(), use_cache=False).logits[0, :-1]
            F.cross_entropy(logits, ids[1:].long(), reduction="sum").backward()
            for name in self.linears:
                self.g[name][-1] = self.g[name][-1].grad[0]

    def _keep(self, name):
        def hook(_, inputs, output):
            output.retain_grad()
            self.x[name].append(inputs[0].detach()[0])
            self.g[name].append(output)

        return hook

    def weight_amax(self, name: str) -> float:
        parent, _, leaf = name.rpartition(".")
        members = next((s for s in FUSED if leaf in s), (leaf,))
        return max(self.weights[f"{parent}.{member}"].abs().max().item() for member in members)

    def input_amax(self, name: str) -> float:
        return max(x.abs().max().item() for x in self.x[name])

    def directional(self, name: str, number_format: str) -> torch.Tensor:
        """s_n of every sequence."""
        weight = self.weights[name]
        sums = []
        for x, g in zip(self.x[name], self.g[name], strict=True):
            weight_q, x_q = rounded(number_format, weight, self.weight_amax(name), x, self.input_amax(name))
            change = x.double() @ (weight_q - weight).double().T + (x_q - x).double() @ weight.double().T
            sums.append((g.double() * change).sum())
        return torch.stack(sums)


@pytest.fixture(scope="module")
def reference(work, found) -> Reference:
    return Reference(load_file(work / "calibration.safetensors")["ids"])


def test_every_linear_agrees(found, reference):
    tokens = 5 * 47
    assert found["tokens"] == tokens
    assert found["linears"].keys() == reference.linears.keys()
    compared = 0
    for name, entry in found["linears"].items():
        trace = sum((g.double().square().sum(-1) * x.double().square().sum(-1)).sum()
                    for x, g in zip(reference.x[name], reference.g[name], strict=True)) / tokens  # fmt: skip
        assert entry["fisher_trace"] == pytest.approx(trace.item(), rel=1e-3), name
        assert entry["input_amax"] == pytest.approx(reference.input_amax(name), rel=1e-4)
        for number_format, cost in entry["costs"].items():
            s = reference.directional(name, number_format)
            expected = (s.square().sum() / 2 / tokens).item()
            # A rounding difference of an input flips a code now and then.
            assert cost["directional"] == pytest.approx(expected, rel=0.03, abs=1e-9), (name, number_format)
            compared += 1
    assert compared > 150


def test_sums_agree_closely(found, reference):
    for number_format in ("nvfp4", "fp8", "mxfp8"):
        ours = theirs = 0.0
        for name, entry in found["linears"].items():
            if number_format in entry["costs"]:
                ours += entry["costs"][number_format]["directional"]
                theirs += (reference.directional(name, number_format).square().sum() / 2 / found["tokens"]).item()
        assert ours == pytest.approx(theirs, rel=1e-3) and ours > 0


def test_threads_change_only_rounding(found, tmp_path):
    one = probe(tmp_path / "one", "--threads", "1")
    for name, entry in found["linears"].items():
        assert one["linears"][name]["fisher_trace"] == pytest.approx(entry["fisher_trace"], rel=1e-4)
        for number_format, cost in entry["costs"].items():
            other = one["linears"][name]["costs"][number_format]["directional"]
            assert other == pytest.approx(cost["directional"], rel=0.03, abs=1e-9)


def test_a_repeated_probe_is_the_same(found, work, tmp_path):
    assert probe(work) == found
    assert probe(tmp_path / "again") == found
