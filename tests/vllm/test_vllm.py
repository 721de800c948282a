"""Checkpoints as the real vLLM reads them: it serves them, and means by their bytes what `evaluate` measures.

Linear by Linear: vLLM's output for its own input is that of the stored bytes and of the format's activation quantizer,
up to bfloat16. A tensor read wrongly, a scheme given to the wrong Linear or an activation left unquantized shows.

End to end the distance of two log-probabilities has a floor: a rounding difference flips a few codes of quantized
activations, and the flips spread from layer to layer. `evaluate` in bfloat16 is as far from itself in float32. vLLM
may be no farther from `evaluate` than that.

The bundled model is also served with vision tower and MTP head quantized: its captions are held against this program's
own forward pass, and the names of its MTP head against the parameters of vLLM's draft model.
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
SAMPLES = TINY / "samples"
TOKENS = 512
REPLY_TOKENS = 48
NEAR_TIE = 0.05  # of two logits, which bfloat16 swaps
FUSED = {
    "qkv_proj": ["q_proj", "k_proj", "v_proj"],
    "gate_up_proj": ["gate_proj", "up_proj"],
    "in_proj_qkvz": ["in_proj_qkv", "in_proj_z"],
}
VLLM_PREFIXES = {"language_model.model.": "model.language_model.", "visual.": "model.visual."}


def prismaquant(*arguments) -> str:
    done = subprocess.run([BINARY, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, f"{arguments}: exit {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def quantize(source: pathlib.Path, out: pathlib.Path, *options) -> pathlib.Path:
    prismaquant("quantize", source, out, "--calibration", TINY / "calibration.txt", "--samples", 16, "--tokens", 256,
                "--no-eval", *options)
    return out


def run_vllm(program: str, *arguments) -> None:
    """In a process of its own, since one process holds one engine."""
    done = subprocess.run([sys.executable, pathlib.Path(__file__).with_name(program), *map(str, arguments)],
                          capture_output=True, text=True)
    assert done.returncode == 0, f"vLLM, {program} {arguments}: exit {done.returncode}\n{done.stderr[-4000:]}"


def serve(model: pathlib.Path, prompts: list[list[int]], max_tokens: int, folder: pathlib.Path,
          images: list[dict] | tuple = ()) -> dict:
    """What serve.py responds; leaves linears.safetensors in `folder`."""
    request, response = folder / "request.json", folder / "response.json"
    request.write_text(json.dumps({"prompts": prompts, "images": list(images), "max_tokens": max_tokens}))
    run_vllm("serve.py", model, request, response, folder / "linears.safetensors")
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
    for prefix, stored in VLLM_PREFIXES.items():
        if layer.startswith(prefix):
            layer = stored + layer.removeprefix(prefix)
            break
    parent, _, leaf = layer.rpartition(".")
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


def quantized_linears(stored: dict, prefix: str) -> set[str]:
    return {name.removesuffix(".weight_scale") for name in stored
            if name.startswith(prefix) and name.endswith(".weight_scale")}


def check_linears(out: pathlib.Path, folder: pathlib.Path, prefix: str = "model.") -> None:
    """All quantized Linears of the checkpoint under `prefix`."""
    stored, seen = tensors(out), load_file(folder / "linears.safetensors")
    layers = {name.rpartition(".")[0] for name in seen}
    assert quantized_linears(stored, prefix) == {linear for layer in layers for linear in members(layer)}
    worst = 0.0
    for layer in layers:
        x, y = seen[layer + ".input"], seen[layer + ".output"].float()
        decoded = [decode(stored, linear) for linear in members(layer)]
        weight = torch.cat([w for _, w in decoded])
        expected = quantize_input(stored, members(layer)[0], decoded[0][0], x) @ weight.T
        expected += stored.get(members(layer)[0] + ".bias", torch.zeros(())).float()
        error = ((y - expected).norm() / expected.norm()).item()
        worst = max(worst, error)
        assert error <= 0.01, f"{layer} ({decoded[0][0]}): relative error {error:.4f}"
    print(f"{len(layers)} layers, largest relative error of an output {worst:.5f}")


@pytest.mark.parametrize("preset", [[], ["--preset", "published", "--kernels", "any"]], ids=["default", "published"])
def test_smollm2_continues_and_agrees_with_evaluate(tmp_path, preset):
    out = quantize(SMOLLM2, tmp_path / "out", "--bpp", "6.0", *preset)
    ids = evaluated(SMOLLM2, out, tmp_path, "bf16")["ids"]
    france = token_ids(SMOLLM2, "The capital of France is", tmp_path)
    served = serve(out, [ids, france], 2, tmp_path)["prompts"]
    assert served[1]["text"].startswith(" Paris")
    check_linears(out, tmp_path)
    check_log_probs(SMOLLM2, out, served[0], tmp_path)


def test_tiny_qwen3_5_agrees_with_evaluate(tmp_path):
    out = quantize(TINY, tmp_path / "out", "--bpp", "5.5")
    ids = evaluated(TINY, out, tmp_path, "bf16")["ids"]
    (served,) = serve(out, [ids], 1, tmp_path)["prompts"]
    check_linears(out, tmp_path)
    check_log_probs(TINY, out, served, tmp_path)


# ---- The bundled model with body, vision tower and MTP head quantized


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> pathlib.Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    prismaquant("quantize", TINY, out, "--bpp", "5.5", "--calibration", TINY / "calibration.txt", "--images", SAMPLES,
                "--no-eval")
    stored = tensors(out)
    for part in ("model.language_model.", "model.visual.", "mtp."):
        kinds = [decode(stored, linear)[0] for linear in quantized_linears(stored, part)]
        print(f"{part}* " + ", ".join(f"{kinds.count(kind)} {kind}" for kind in sorted(set(kinds))))
        assert kinds
    return out


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    rows = [json.loads(line) for line in (SAMPLES / "captions.jsonl").read_text().splitlines()]
    assert rows
    return [{**row, "image": str(SAMPLES / row["image"])} for row in rows]


def asked(questions: list[dict]) -> list[dict]:
    return [{key: row[key] for key in ("image", "prompt")} for row in questions]


@pytest.fixture(scope="module")
def served_whole(whole, questions, tmp_path_factory) -> tuple[dict, pathlib.Path]:
    """What serve.py responds on the held-out window and the sample images, and its folder."""
    folder = tmp_path_factory.mktemp("served_whole")
    ids = evaluated(TINY, whole, folder, "bf16")["ids"]
    return serve(whole, [ids], REPLY_TOKENS, folder, asked(questions)), folder


def forward_captions(model: pathlib.Path, rows: list[dict], folder: pathlib.Path, precision: str) -> dict:
    """Ids and logits of captioned images from this program's own forward pass: see tests/tools/sequence_dump.cc."""
    texts, images, out = folder / "ids.json", folder / "captions.jsonl", folder / f"captions_{precision}.safetensors"
    texts.write_text("[]")
    images.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run([pathlib.Path(BINARY).with_name("sequence_dump"), model, texts, images, precision, out],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out)


def check_captions(model: pathlib.Path, questions: list[dict], replies: list[dict], folder: pathlib.Path,
                   near_tie: float | None = None) -> None:
    """vLLM's greedy replies against this program's forward pass on them: ids, log-probabilities and choice of tokens.

    As for text, vLLM may be no farther from the forward pass in bfloat16 than that is from itself in float32. The token
    that it chooses may be `near_tie` below the best, by default as far as rounding moves the two best apart anywhere.
    """
    rows = [{**row, "caption": reply["text"]} for row, reply in zip(questions, replies, strict=True)]
    rounded, exact = (forward_captions(model, rows, folder, precision) for precision in ("bfloat16", "float32"))
    floors, distances, gaps, moves = [], [], [], []
    for n, reply in enumerate(replies):
        ids = reply["prompt_ids"] + reply["ids"]
        assert exact[f"caption.{n}.ids"].tolist() == ids
        best = torch.tensor(reply["best"], dtype=torch.float64)
        tokens, served = best[..., 0].long(), best[..., 1].float()
        low, high = (dump[f"caption.{n}.logits"][len(reply["prompt_ids"]) - 1:-1].float().log_softmax(-1)
                     for dump in (rounded, exact))
        floors.append((low - high).gather(1, tokens).abs())
        distances.append((served - low.gather(1, tokens)).abs())
        gaps.append(high.amax(-1) - high.gather(1, torch.tensor(reply["ids"])[:, None])[:, 0])
        leaders = high.topk(2).indices
        moves.append((low - high).gather(1, leaders).diff(dim=1).abs().max().item())
        print(f"{pathlib.Path(rows[n]['image']).name}: {reply['text']!r}, below the best by "
              f"{[round(gap, 3) for gap in gaps[-1].tolist() if gap > 0]}")
    floor, apart, gap = torch.cat(floors), torch.cat(distances), torch.cat(gaps)
    near_tie = near_tie or max(moves)
    same = sum(bool((gap == 0).all()) for gap in gaps)
    right = sum(reply["text"] == row["caption"] for row, reply in zip(questions, replies, strict=True))
    print(f"{same} of {len(gaps)} captions are the own greedy ones, {int((gap == 0).sum())} of {len(gap)} tokens the "
          f"own best, farthest {gap.max():.3f} below it (bound {near_tie:.3f}), {right} captions right; "
          f"vLLM against the forward pass {apart.mean():.5f}, that in bf16 against float32 {floor.mean():.5f} nats")
    assert gap.max() <= near_tie
    assert apart.mean() <= 1.25 * floor.mean()


def test_tiny_qwen3_5_captions(questions, tmp_path):
    """The source: the chat, the images and the wiring, without quantized activations that make rounding large."""
    replies = serve(TINY, [], REPLY_TOKENS, tmp_path, asked(questions))["images"]
    check_captions(TINY, questions, replies, tmp_path, NEAR_TIE)


def test_whole_tiny_qwen3_5_continues_and_agrees_with_evaluate(whole, served_whole):
    served, folder = served_whole
    (text,) = served["prompts"]
    print(f"continues with {text['text']!r}")
    assert text["text"].strip()
    check_linears(whole, folder)
    check_log_probs(TINY, whole, text, folder)


def test_whole_tiny_qwen3_5_captions(whole, served_whole, questions, tmp_path):
    check_captions(whole, questions, served_whole[0]["images"], tmp_path)


def fused(parameter: str) -> str:
    """vLLM's name of a parameter that it fuses."""
    for layer, linears in FUSED.items():
        for linear in linears:
            parameter = parameter.replace(f".{linear}.", f".{layer}.")
    return parameter


def test_whole_tiny_qwen3_5_draft_head_loads(whole, tmp_path):
    response = tmp_path / "draft.json"
    run_vllm("draft.py", whole, response, tmp_path / "linears.safetensors")
    draft = {key: set(names) for key, names in json.loads(response.read_text()).items()}
    stored = {fused(name.replace("mtp.", "model.", 1)) for name in tensors(whole) if name.startswith("mtp.")}
    stored |= {"lm_head.weight", "model.embed_tokens.weight"}  # the body's
    print(f"{len(draft['loaded'])} parameters loaded of {len(draft['parameters'])}")
    assert draft["loaded"] == draft["parameters"]
    assert draft["loaded"] == stored
    check_linears(whole, tmp_path, "mtp.")
