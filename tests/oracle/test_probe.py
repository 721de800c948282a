"""The probe's statistics of all parts of a model against transformers' autograd, with rounding errors by the formats'
definitions.

Data labels make the loss a function of the text alone, so every number has one right value. Experts are told apart by
a loop over them (PlainMixture); the MTP head is wired on transformers' decoder layer.
"""

import json
import os
import pathlib
import subprocess

import pytest
import torch
import torch.nn.functional as F
from reference_models import bundled_model, load_model, unpack_experts
from safetensors.torch import load_file
from stored import round_to_e2m1
from whole_model import MtpHead

PROGRAM = os.environ["PRISMAQUANT_BINARY"]
FUSED = [("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("in_proj_qkv", "in_proj_z")]
WINDOWS, LENGTH = 5, 48
OPTIONS = ["--calibration", bundled_model() / "calibration.txt", "--samples", str(WINDOWS), "--tokens", str(LENGTH),
           "--images", bundled_model() / "samples", "--image-samples", "3", "--labels", "data", "--precision", "float32"]
MODELS = ["tiny-qwen3_5", "tiny-qwen3_5_moe"]


def probe(model: str, work, *extra) -> dict:
    folder = bundled_model().parent / model
    done = subprocess.run([PROGRAM, "probe", folder, "--work", work, *OPTIONS, "--json", "-", *extra],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Probed:
    """One probe of a bundled model and its reference."""

    def __init__(self, model: str, work: pathlib.Path):
        self.model, self.work = model, work
        self.json = probe(model, work)
        self.reference = Reference(bundled_model().parent / model, work)


@pytest.fixture(scope="module", params=MODELS)
def probed(request, tmp_path_factory) -> Probed:
    return Probed(request.param, tmp_path_factory.mktemp("probe") / "work")


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


def is_reached(name: str) -> bool:
    return ".layers." in name or ".blocks." in name or ".merger." in name or name in ("lm_head", "mtp.fc")


class Reference:
    """Inputs and output gradients of every Linear, per calibration sequence: the windows, then the captions."""

    def __init__(self, folder: pathlib.Path, work: pathlib.Path):
        model = load_model(folder, torch.float32)
        unpack_experts(model)
        mtp = MtpHead(model, folder)
        modules = [*model.named_modules(), *((f"mtp.{name}", module) for name, module in mtp.named_modules())]
        self.linears = {
            name: module for name, module in modules if isinstance(module, torch.nn.Linear) and is_reached(name)
        }
        self.weights = {name: module.weight.detach() for name, module in self.linears.items()}
        # name -> sequence -> (input, output), then (input, gradient)
        self.records = {name: {} for name in self.linears}
        self.sequence = 0
        for name, module in self.linears.items():
            module.register_forward_hook(self._keep(name))
        self.tokens = {"text": 0, "caption": 0, "mtp": 0}
        for ids in load_file(work / "calibration.safetensors")["ids"].long():
            self._run_text(model, mtp, ids)
        for file in sorted((work / "captions").iterdir(), key=lambda path: int(path.stem)):
            self._run_caption(model, load_file(file))
        self.sequences = self.sequence

    def _run_text(self, model, mtp, ids):
        out = model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
        F.cross_entropy(out.logits[0, :-1], ids[1:], reduction="sum").backward()
        with torch.no_grad():
            embedded = model.get_input_embeddings()(ids[None])
        logits = mtp(embedded, out.hidden_states[-1].detach())
        F.cross_entropy(logits[0, :-1], ids[2:], reduction="sum").backward()
        self.tokens["text"] += len(ids) - 1
        self.tokens["mtp"] += len(ids) - 2
        self._finish()

    def _run_caption(self, model, stored):
        ids = stored["ids"].long()
        first, rows, columns = stored["numbers"].tolist()
        image = model.config.image_token_id
        logits = model(input_ids=ids[None], pixel_values=stored["patches"], use_cache=False,
                       image_grid_thw=torch.tensor([[1, rows, columns]]),
                       mm_token_type_ids=(ids == image).long()[None]).logits[0]  # fmt: skip
        F.cross_entropy(logits[first - 1 : -1], ids[first:], reduction="sum").backward()
        self.tokens["caption"] += len(ids) - first
        self._finish()

    def _keep(self, name):
        def hook(_, inputs, output):
            if name == "lm_head" and self.sequence in self.records[name]:
                return  # the MTP head's use of it is not what the body's Linear is judged by
            output.retain_grad()
            self.records[name][self.sequence] = (inputs[0].detach(), output)

        return hook

    def _finish(self):
        for name, of_sequence in self.records.items():
            if self.sequence in of_sequence:
                x, y = of_sequence[self.sequence]
                of_sequence[self.sequence] = (x.flatten(0, -2), y.grad.flatten(0, -2))
        if self.sequence >= WINDOWS:
            self.records["lm_head"].pop(self.sequence, None)  # priced on the windows alone
        else:
            x, g = self.records["lm_head"][self.sequence]
            self.records["lm_head"][self.sequence] = (x[:-1], g[:-1])
        self.sequence += 1

    def part(self, name: str) -> str:
        return "mtp" if name.startswith("mtp.") else "caption" if ".visual." in name else "text"

    def weight_amax(self, name: str) -> float:
        parent, _, leaf = name.rpartition(".")
        members = next((s for s in FUSED if leaf in s), (leaf,))
        return max(self.weights[f"{parent}.{member}"].abs().max().item() for member in members) if parent else (
            self.weights[name].abs().max().item())  # fmt: skip

    def own_amax(self, name: str) -> float:
        return max((x.abs().max().item() for x, _ in self.records[name].values()), default=0)

    def input_amax(self, name: str) -> float:
        """Experts of a layer share it: gate and up projections of all, and down projections of all."""
        layer, experts, rest = name.partition(".experts.")
        if not experts:
            return self.own_amax(name)
        down = rest.endswith("down_proj")
        return max(self.own_amax(other) for other in self.linears
                   if other.startswith(layer + experts) and other.endswith("down_proj") == down)  # fmt: skip

    def trace(self, name: str) -> float:
        return sum((g.double().square().sum(-1) * x.double().square().sum(-1)).sum().item()
                   for x, g in self.records[name].values())  # fmt: skip

    def squares(self, name: str, number_format: str) -> torch.Tensor:
        """q_n of every sequence: the squares of the sum's independent parts."""
        weight = self.weights[name].double()
        weight_amax, input_amax = self.weight_amax(name), self.input_amax(name)
        sums = torch.zeros(self.sequences, dtype=torch.float64)
        for n, (x, g) in self.records[name].items():
            weight_q, x_q = rounded(number_format, self.weights[name], weight_amax, x, input_amax)
            x, g, weight_q, x_q = x.double(), g.double(), weight_q.double(), x_q.double()
            if name == "lm_head":  # by position, from the logits, so with the product of both errors
                parts = (g * (x_q @ weight_q.T - x @ weight.T)).sum(1)
            else:
                parts = torch.cat([((g.T @ x) * (weight_q - weight)).sum(1), ((g @ weight) * (x_q - x)).sum(0)])
            sums[n] = parts.square().sum()
        return sums

    def loss(self, name: str, number_format: str) -> dict:
        squares = self.squares(name, number_format) / 2
        if self.part(name) == "mtp":
            return {"mtp": squares.sum().item() / self.tokens["mtp"]}
        return {"text": squares[:WINDOWS].sum().item() / self.tokens["text"],
                "caption": squares[WINDOWS:].sum().item() / self.tokens["caption"]}  # fmt: skip


def test_every_linear_agrees(probed):
    found, reference = probed.json, probed.reference
    assert found["tokens"] == reference.tokens["text"] == WINDOWS * (LENGTH - 1)
    assert found["caption_tokens"] == reference.tokens["caption"] > 10
    assert found["mtp_tokens"] == reference.tokens["mtp"]
    named = {name.replace("mlp.shared.", "mlp.shared_expert.") for name in reference.linears}
    assert found["linears"].keys() == named
    compared = {"text": 0, "caption": 0, "mtp": 0}
    for name, entry in found["linears"].items():
        part = reference.part(name)
        tokens = {"text": reference.tokens["text"] + reference.tokens["caption"]}.get(part, reference.tokens[part])
        if name == "lm_head":
            tokens = reference.tokens["text"]
        seen = sum(len(x) for x, _ in reference.records[name].values())
        assert entry["tokens"] == seen, name
        assert entry["fisher_trace"] == pytest.approx(reference.trace(name) / tokens, rel=2e-3), name
        assert entry["input_amax"] == pytest.approx(reference.input_amax(name), rel=1e-4), name
        for number_format, cost in entry["costs"].items():
            expected = reference.loss(name, number_format)
            # A rounding difference of an input flips a code now and then.
            assert cost["directional"] == pytest.approx(expected[part], rel=0.03, abs=2e-9), (name, number_format)
            if part == "text" and name != "lm_head":
                # Of few positions, so that one flipped code counts more.
                assert cost["directional_caption"] == pytest.approx(expected["caption"], rel=0.1, abs=2e-9)
            compared[part] += 1
    assert min(compared.values()) > 20, compared


def test_sums_agree_closely(probed):
    for number_format in ("nvfp4", "fp8", "mxfp8"):
        for part in ("text", "caption", "mtp"):
            ours = theirs = 0.0
            for name, entry in probed.json["linears"].items():
                if number_format in entry["costs"] and probed.reference.part(name) == part:
                    ours += entry["costs"][number_format]["directional"]
                    theirs += probed.reference.loss(name, number_format)[part]
            assert ours == pytest.approx(theirs, rel=2e-3) and ours > 0, (number_format, part)


def test_threads_change_only_rounding(probed, tmp_path):
    one = probe(probed.model, tmp_path / "one", "--threads", "1")
    for name, entry in probed.json["linears"].items():
        assert one["linears"][name]["fisher_trace"] == pytest.approx(entry["fisher_trace"], rel=1e-4)
        for number_format, cost in entry["costs"].items():
            other = one["linears"][name]["costs"][number_format]["directional"]
            assert other == pytest.approx(cost["directional"], rel=0.03, abs=2e-9)


def test_a_repeated_probe_is_the_same(probed, tmp_path):
    assert probe(probed.model, probed.work) == probed.json
    assert probe(probed.model, tmp_path / "again") == probed.json


def test_formats_asked_for_later_are_added(probed, tmp_path):
    later = probe(probed.model, probed.work, "--formats", "int8,mxfp4")
    for name, entry in probed.json["linears"].items():
        for number_format, cost in entry["costs"].items():
            assert later["linears"][name]["costs"][number_format] == cost
        assert later["linears"][name]["fisher_trace"] == entry["fisher_trace"]
    added = {f for entry in later["linears"].values() for f in entry["costs"]}
    assert {"int8", "mxfp4"} <= added
    at_once = probe(probed.model, tmp_path / "at_once", "--formats", "int8,mxfp4")
    assert at_once == later
