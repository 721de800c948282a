"""The whole program on the bundled model: what it writes is loaded by transformers + compressed-tensors and measured there.

The oracle's forward pass is transformers' in float32 with compressed-tensors' activation quantization, its weights decoded
from the stored bytes by stored.py.
"""
import json
import math
import os
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, Qwen3_5ForConditionalGeneration

from stored import decode, tensors

ROOT = pathlib.Path(os.environ["PRISMAQUANT_SOURCE_DIR"])
PROGRAM = os.environ["PRISMAQUANT_BINARY"]
SOURCE = ROOT / "examples" / "tiny-qwen3_5"
TEXT = SOURCE / "heldout.txt"
COMMON = ["--calibration", str(SOURCE / "calibration.txt"), "--samples", "16", "--tokens", "256",
          "--images", str(SOURCE / "samples"), "--precision", "float32"]
QUICK = ["--calibration", str(SOURCE / "calibration.txt"), "--samples", "4", "--tokens", "128",
         "--images", str(SOURCE / "samples"), "--image-samples", "4", "--precision", "float32"]


def run(*args, expect=0):
    done = subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == expect, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done


def load(folder):
    model, info = Qwen3_5ForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(key.startswith("mtp.") for key in info["unexpected_keys"])
    model.eval()
    if hasattr(model, "ct_decompress_hook"):
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    stored = tensors(folder)
    scales = {n: p.detach().float() for n, p in model.named_parameters() if n.endswith("input_global_scale")}
    model = model.to(torch.float32)
    quantized = 0
    for name, parameter in model.named_parameters():
        if name in scales:
            parameter.data = scales[name]
    for name, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear):
            continue
        format_name, weight = decode(stored, name)
        if format_name != "bf16":
            assert getattr(module, "quantization_scheme", None) is not None, name
            module.weight.data = weight
            quantized += 1
    return model, quantized


@torch.no_grad()
def measure(source, quantized, tokens, window=512):
    ids = AutoTokenizer.from_pretrained(SOURCE)(TEXT.read_text(), add_special_tokens=False)["input_ids"][:tokens]
    kl, agree, nll, count = 0.0, 0, 0.0, 0
    for begin in range(0, tokens, window):
        x = torch.tensor([ids[begin : begin + window]])
        p = F.log_softmax(source(input_ids=x, use_cache=False).logits[0, :-1].float(), -1)
        q = F.log_softmax(quantized(input_ids=x, use_cache=False).logits[0, :-1].float(), -1)
        kl += (p.exp() * (p - q)).sum().item()
        agree += (p.argmax(-1) == q.argmax(-1)).sum().item()
        nll -= q.gather(1, x[0, 1:, None]).sum().item()
        count += p.shape[0]
    return kl / count, agree / count, math.exp(nll / count)


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("run") / "work"


CASES = {
    "gptq": ["--bpp", "5.5"],
    "rtn": ["--bpp", "5.5", "--render", "rtn"],
    "published": ["--bpp", "5.5", "--preset", "published", "--kernels", "any"],
}


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_means_what_transformers_reads(case, work, tmp_path):
    out = tmp_path / "out"
    run("quantize", SOURCE, out, "--work", work, *COMMON, *CASES[case], "--eval-text", TEXT, "--eval-tokens", "2048",
        "--json", tmp_path / "quantize.json")
    result = json.loads((tmp_path / "quantize.json").read_text())
    assert result["bpp"] <= 5.5 and result["slack_bytes"] >= 0
    assert result["gap"] == 0
    run("verify", out, "--source", SOURCE)

    source_tensors, out_tensors = tensors(SOURCE), tensors(out)
    quantized_names = {n for n, f in result["choices"].items() if f != "bf16"}
    for name, tensor in source_tensors.items():
        if name.removesuffix(".weight") in quantized_names:
            continue
        assert out_tensors[name].dtype == tensor.dtype
        assert torch.equal(out_tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name

    source, none = load(SOURCE)
    model, quantized = load(out)
    # transformers does not read the MTP head.
    read = {name for name in quantized_names if not name.startswith("mtp.")}
    assert none == 0 and quantized == len(read) < len(quantized_names)
    kl, top1, ppl = measure(source, model, 2048)
    assert result["evaluation"]["kl"] == pytest.approx(kl, rel=0.02, abs=3e-4)
    # Embeddings changed by 1e-7 of their size flip codes of activations, and with them the top-1 token of 70 to 80 positions of the 2044:
    # agreement moves by up to 0.01.
    assert result["evaluation"]["top1"] == pytest.approx(top1, abs=0.015)
    assert result["evaluation"]["ppl"] == pytest.approx(ppl, rel=3e-3)
    assert kl > 1e-4
    if case == "rtn":
        assert 0.5 < result["predicted_kl"] / kl < 2


def test_gptq_beats_round_to_nearest(work, tmp_path):
    kl = {}
    for mode in ("gptq", "rtn"):
        run("quantize", SOURCE, tmp_path / mode, "--work", work, *COMMON, "--uniform", "nvfp4", "--render", mode,
            "--eval-text", TEXT, "--eval-tokens", "4096", "--json", tmp_path / f"{mode}.json")
        kl[mode] = json.loads((tmp_path / f"{mode}.json").read_text())["evaluation"]["kl"]
    assert kl["gptq"] < 0.9 * kl["rtn"]


def test_predictions_know_what_gptq_repairs(work, tmp_path):
    """Cross-fitted errors of GPTQ cost less than those of rounding to nearest, more than those on the fitted tokens."""
    run("quantize", SOURCE, tmp_path / "out", "--work", work, *COMMON, "--bpp", "4.6", "--cost-render", "gptq",
        "--eval-text", TEXT, "--eval-tokens", "4096", "--json", tmp_path / "quantize.json")
    result = json.loads((tmp_path / "quantize.json").read_text())
    assert 0.6 < result["predicted_kl"] / result["evaluation"]["kl"] < 1.6
    probed = json.loads(run("probe", SOURCE, "--work", work, *COMMON, "--json", "-").stdout)["linears"]
    sums = {key: sum(linear["costs"]["nvfp4"].get(key, 0) for name, linear in probed.items()
                     if "nvfp4" in linear["costs"] and name != "lm_head")
            for key in ("directional", "directional_gptq", "directional_gptq_in_sample")}  # fmt: skip
    assert 0 < sums["directional_gptq_in_sample"] < sums["directional_gptq"] < 0.95 * sums["directional"]


def test_published_recipe_has_its_own_bytes(work, tmp_path):
    for mode in ("gptq", "gptq+sweep"):
        run("quantize", SOURCE, tmp_path / mode, "--work", work, *COMMON, "--bpp", "4.5", "--render", mode, "--no-eval")
        run("verify", tmp_path / mode, "--source", SOURCE)
    ours, published = tensors(tmp_path / "gptq"), tensors(tmp_path / "gptq+sweep")
    packed = [name for name in ours if name.endswith("weight_packed")]
    assert len(packed) > 20
    assert all(not torch.equal(ours[name], published[name]) for name in packed)


def test_forecast_is_near_what_a_run_takes(tmp_path):
    flags = [*QUICK, "--bpp", "5.5", "--no-eval"]
    run("quantize", SOURCE, tmp_path / "out", *flags, "--profile", "--json", tmp_path / "out.json")
    result = json.loads((tmp_path / "out.json").read_text())
    forecast = result["forecast"]["stages"]
    for stage in ("probe, forward", "probe, head", "probe, backward", "render"):
        counted = sum(kernel["flop"] for kernel in result["kernels"] if kernel["stage"] == stage)
        assert 0.75 < forecast[stage]["flop"] / counted < 1.33, stage
        # So little a run is mostly the library, of whose code more or less is resident from one run to the next.
        assert abs(forecast[stage]["resident_bytes"] - result["stages"][stage]["peak_memory_bytes"]) < 300e6, stage
    assert 0.9 < forecast["export"]["written_bytes"] / result["file_bytes"] < 1.1
    # Nothing is left by a dry run, and it forecasts the same work.
    dry = json.loads(run("quantize", SOURCE, tmp_path / "dry", *flags, "--dry-run", "--json", "-").stdout)
    assert not (tmp_path / "dry.work").exists() and not (tmp_path / "dry").exists()
    assert {stage: needs["flop"] for stage, needs in dry["stages"].items()} == {s: needs["flop"] for s, needs in forecast.items()}
    assert all(rate > 0 for rate in dry["rates"].values()) and all(needs["seconds"] > 0 for needs in dry["stages"].values())


def test_memory_that_is_too_little_is_refused_before_anything_is_done(tmp_path):
    flags = ["quantize", SOURCE, tmp_path / "out", *QUICK, "--no-eval"]
    said = run(*flags, "--memory", "100MB", expect=1).stderr.strip()
    smallest = re.search(r"the smallest --memory that can is (\d+)MB", said)
    assert smallest and said.count("\n") == 0, said
    assert not list(tmp_path.iterdir())
    # What the process holds before it begins differs a little from start to start.
    run(*flags, "--memory", f"{int(smallest[1]) + 20}MB", "--dry-run")


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_interrupted_run_says_how_to_go_on(tmp_path):
    """One signal ends the run at the next commit."""
    out = tmp_path / "out"
    command = [PROGRAM, *map(str, ["quantize", SOURCE, out, *COMMON, "--bpp", "5.5", "--no-eval"])]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    said = ""
    while "layers" not in said:
        line = process.stderr.readline()
        assert line, said
        said += line
    process.send_signal(signal.SIGINT)
    said += process.stderr.read()
    assert process.wait() == 130
    assert said.splitlines()[-1] == (f"prismaquant: interrupted; {out}.work keeps what is finished, and the same command goes on "
                                     "from there")
    assert not out.exists()
    run("quantize", SOURCE, out, *COMMON, "--bpp", "5.5", "--no-eval")
    assert (out / "config.json").exists()
    held = json.loads(run("runs", f"{out}.work", "--json", "-").stdout)
    assert held["source_folder"] == str(SOURCE)
    assert held["identity"]["seed"] == "0"
    assert {"nvfp4", "fp8", "mxfp8"} <= set(held["priced"])
    assert held["stages"]["forward"] == held["stages"]["backward"] > 1
    assert held["bytes"] == sum(path.stat().st_size for path in pathlib.Path(f"{out}.work").rglob("*") if path.is_file())


def test_fifty_kills_leave_the_same_bytes(tmp_path):
    """Runs that are killed at random moments, over and over, end with what one that was left alone wrote."""
    def command(name):
        # The folder's name stands in the card, so both runs write to a folder of the same name.
        return ["quantize", SOURCE, tmp_path / name / "out", *QUICK, "--bpp", "5.5", "--smooth", "--validate", "2",
                "--eval-text", TEXT, "--eval-tokens", "1024"]

    (tmp_path / "whole").mkdir()
    begin = time.monotonic()
    run(*command("whole"))
    seconds = time.monotonic() - begin
    expected = contents(tmp_path / "whole" / "out")
    draw = random.Random(0)
    kills = finished = 0
    while kills < 50 or finished == 0:
        killed = tmp_path / f"killed-{finished}"
        killed.mkdir(exist_ok=True)
        process = subprocess.Popen([PROGRAM, *map(str, command(killed.name))], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            assert process.wait(timeout=draw.uniform(0.05, 0.3) * seconds) == 0
        except subprocess.TimeoutExpired:
            gentle = draw.random() < 0.3
            process.send_signal(signal.SIGINT if gentle else signal.SIGKILL)
            # A signal that comes before the program catches it kills; one that comes after the last commit changes nothing.
            assert process.wait() in ([130, -signal.SIGINT, 0] if gentle else [-signal.SIGKILL])
            kills += 1
            continue
        assert contents(killed / "out") == expected, kills
        finished += 1


def test_changed_weights_are_found_by_their_hash(tmp_path):
    """A byte between the samples that the fingerprint takes."""
    source = tmp_path / "source"
    shutil.copytree(SOURCE, source)
    work = ["--work", tmp_path / "work", "--check-hash"]
    run("probe", source, *work, *QUICK)
    weights = max(source.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    changed = bytearray(weights.read_bytes())
    changed[len(changed) // 4] ^= 1
    weights.write_bytes(changed)
    run("probe", source, *work[:2], *QUICK)
    said = run("probe", source, *work, *QUICK, expect=2).stderr
    assert "the weights have SHA-256" in said and "expected" in said and str(source) in said
    run("probe", source, "--work", tmp_path / "other", *QUICK)
    said = run("probe", source, "--work", tmp_path / "other", "--check-hash", *QUICK, expect=2).stderr
    assert "was begun without it" in said and str(tmp_path / "other") in said


def test_without_calibration_the_bundled_text_is_taken(tmp_path):
    """The text is in the program: it needs no file beside it, and a file of the same bytes gives the same checkpoint."""
    size = ["--samples", "8", "--tokens", "128", "--eval-tokens", "512", "--precision", "float32", "--bpp", "6"]
    subprocess.run([PROGRAM, "quantize", SOURCE, "out", *size], cwd=tmp_path, check=True, capture_output=True)
    run("quantize", SOURCE, tmp_path / "same", *size, "--calibration", ROOT / "data" / "calibration.jsonl")
    records = [json.loads((tmp_path / name / "prismaquant.json").read_text()) for name in ("out", "same")]
    assert records[0]["run"] == records[1]["run"] and records[0]["choices"] == records[1]["choices"]
    assert records[0]["evaluation"]["kl"] == records[1]["evaluation"]["kl"]
    assert [record["calibration"] for record in records] == ["bundled", "calibration.jsonl"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "- calibration: bundled, 8 samples of 128 tokens" in card and "bundled, last tenth" in card
    assert "prismaquant quantize SRC OUT --samples 8 --tokens 128" in card
    assert "--calibration calibration.jsonl" in (tmp_path / "same" / "README.md").read_text()


def test_choices_can_be_edited(work, tmp_path):
    run("allocate", "--work", work, "--bpp", "5.0", "--json", tmp_path / "plan.json")
    plan = json.loads((tmp_path / "plan.json").read_text())
    edited = next(n for n in plan["choices"] if n.endswith("layers.0.mlp.down_proj"))
    plan["choices"][edited] = "bf16"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    run("export", "--work", work, tmp_path / "out", "--choices", tmp_path / "plan.json")
    record = json.loads((tmp_path / "out" / "prismaquant.json").read_text())
    assert record["choices"][edited] == "bf16"
    inspected = json.loads(run("inspect", tmp_path / "out", "--json", "-").stdout)
    assert inspected["formats"]["nvfp4"]["linears"] == sum(f == "nvfp4" for f in plan["choices"].values())
    fused = next(n for n in plan["choices"] if n.endswith("layers.0.mlp.gate_proj"))
    plan["choices"][fused] = "bf16" if plan["choices"][fused] != "bf16" else "nvfp4"
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    refused = run("export", "--work", work, tmp_path / "out2", "--choices", tmp_path / "plan.json", expect=2)
    assert "fused" in refused.stderr and not (tmp_path / "out2").exists()
