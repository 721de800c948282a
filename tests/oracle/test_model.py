"""The model families against transformers: logits in float32 and bfloat16, gradients in float64."""

import json
import shutil

import pytest
import torch
from reference_models import (
    LINEAR_ROPE,
    LLAMA3_ROPE,
    WINDOW,
    bundled_model,
    dump,
    float64_everywhere,
    gradients,
    load_model,
    make_checkpoint,
    random_ids,
    unpack_experts,
)
from tokenizers import Tokenizer


def delta_net(key_heads: int, value_heads: int, **more) -> dict:
    return {"linear_num_key_heads": key_heads, "linear_num_value_heads": value_heads, **more}


def sliding(**more) -> dict:
    return {"sliding_window": WINDOW, **more}


def upper_sliding(first: int, **more) -> dict:
    return sliding(use_sliding_window=True, max_window_layers=first, **more)


CASES = {
    "llama": {"family": "llama"},
    "llama-multi-head-tied": {"family": "llama", "tie": True, "config": {"num_key_value_heads": 4}},
    "llama-one-kv-head": {"family": "llama", "config": {"num_key_value_heads": 1}},
    "llama-wide-heads": {"family": "llama", "config": {"head_dim": 24, "rms_norm_eps": 1e-5}},
    "llama-llama3-rope": {"family": "llama", "config": {"rope_parameters": LLAMA3_ROPE}},
    "llama-biases": {"family": "llama", "config": {"attention_bias": True, "mlp_bias": True}},
    "llama-linear-rope": {"family": "llama", "config": {"rope_parameters": LINEAR_ROPE}},
    "mistral": {"family": "mistral", "config": sliding()},
    "mistral-no-window-tied": {
        "family": "mistral",
        "tie": True,
        "config": {"sliding_window": None, "num_key_value_heads": 4},
    },
    "mistral-wide-heads-linear-rope": {
        "family": "mistral",
        "config": sliding(head_dim=24, num_key_value_heads=1, rope_parameters=LINEAR_ROPE),
    },
    "qwen2": {"family": "qwen2"},
    "qwen2-tied": {"family": "qwen2", "tie": True, "config": {"num_key_value_heads": 1}},
    "qwen2-sliding": {"family": "qwen2", "config": upper_sliding(1, num_key_value_heads=4)},
    "qwen2-all-sliding": {"family": "qwen2", "config": upper_sliding(0)},
    "qwen2-layer-types": {
        "family": "qwen2",
        "config": upper_sliding(2, layer_types=["sliding_attention", "full_attention"]),
    },
    "qwen3-sliding": {"family": "qwen3", "config": upper_sliding(1)},
    "gemma3_text": {"family": "gemma3_text", "tie": True},
    "gemma3_text-untied": {
        "family": "gemma3_text",
        "config": {"attention_bias": True, "head_dim": 24, "num_key_value_heads": 1},
    },
    "gemma3_text-pattern": {
        "family": "gemma3_text",
        "tie": True,
        "config": {
            "layer_types": None,
            "sliding_window_pattern": 2,
            "num_hidden_layers": 4,
            "num_key_value_heads": 4,
            "rope_parameters": None,
        },
    },
    "gemma3_text-window-2": {
        "family": "gemma3_text",
        "tie": True,
        "config": {"sliding_window": 2},
    },
    "gemma3": {"family": "gemma3", "tie": True},
    "gemma3-new-names": {
        "family": "gemma3",
        "tie": True,
        "rename": {
            "language_model.model.": "model.language_model.",
            "vision_tower.": "model.vision_tower.",
            "multi_modal_projector.": "model.multi_modal_projector.",
        },
    },
    "qwen3": {"family": "qwen3"},
    "qwen3-wide-heads-tied": {"family": "qwen3", "tie": True, "config": {"head_dim": 40}},
    "qwen3-bias": {"family": "qwen3", "config": {"attention_bias": True}},
    "qwen3_5": {"family": "qwen3_5"},
    "qwen3_5-ratio-1-tied": {"family": "qwen3_5", "tie": True, "config": delta_net(3, 3)},
    "qwen3_5-ratio-3": {
        "family": "qwen3_5",
        "config": delta_net(2, 6, num_key_value_heads=1, linear_conv_kernel_dim=3),
    },
    "qwen3_5_text": {"family": "qwen3_5_text", "config": delta_net(1, 3)},
    "qwen3_5_moe": {"family": "qwen3_5_moe"},
    "qwen3_5_moe_text-one-expert": {"family": "qwen3_5_moe_text", "config": {"num_experts_per_tok": 1}},
    "qwen3_moe": {"family": "qwen3_moe"},
    "qwen3_moe-not-normalized-tied": {
        "family": "qwen3_moe",
        "tie": True,
        "config": {"norm_topk_prob": False, "num_experts_per_tok": 3},
    },
    "qwen3_5_text-tied": {"family": "qwen3_5_text", "tie": True},
}
LENGTHS = [1, 63, 64, 65, 130]
WINDOW_LENGTHS = [1, WINDOW - 1, WINDOW, WINDOW + 1, 2 * WINDOW + 1, 70]


def lengths_of(name: str) -> list[int]:
    if name in ("llama", "qwen3", "qwen3_5"):
        return LENGTHS
    slides = name in ("mistral", "gemma3", "gemma3_text") or "sliding" in name
    return WINDOW_LENGTHS if slides else [70]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Folder of a case's checkpoint in a dtype, made once."""
    made = {}

    def get(name: str, dtype: torch.dtype):
        if (name, dtype) not in made:
            folder = tmp_path_factory.mktemp("checkpoint")
            made[name, dtype] = make_checkpoint(CASES[name], folder, dtype)
        return made[name, dtype]

    return get


@pytest.fixture(scope="module")
def bundled_ids() -> torch.Tensor:
    tokenizer = Tokenizer.from_file(str(bundled_model() / "tokenizer.json"))
    ids = tokenizer.encode((bundled_model() / "heldout.txt").read_text()).ids
    return torch.tensor(ids[:1024]).reshape(2, 512)


def reference_logits(folder, ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    with torch.no_grad():
        return load_model(folder, dtype)(input_ids=ids, use_cache=False).logits


def assert_logits_match(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert found.shape == expected.shape and found.dtype == expected.dtype
    spread = (expected.max() - expected.min()).item()
    error = (found - expected).abs().max().item() / spread
    print(f"logits of {tuple(found.shape)}: error {error:.1e} of the range")
    assert error <= 2e-5


@pytest.mark.parametrize("name", CASES)
def test_float32_logits(name, checkpoint, tmp_path):
    folder = checkpoint(name, torch.float32)
    for tokens in lengths_of(name):
        ids = random_ids(CASES[name], 2, tokens)
        found = dump(folder, ids, "float32", tmp_path)["logits"]
        assert_logits_match(found, reference_logits(folder, ids, torch.float32))


def test_float32_logits_of_bundled_model(bundled_ids, tmp_path):
    found = dump(bundled_model(), bundled_ids, "float32", tmp_path)["logits"]
    assert_logits_match(found, reference_logits(bundled_model(), bundled_ids, torch.float32))


def test_old_spelling_of_gemma_configuration(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("gemma3_text", torch.float32), tmp_path / "old")
    config = json.loads((folder / "config.json").read_text())
    new = config.pop("rope_parameters")
    del config["layer_types"], config["_sliding_window_pattern"]
    full = new["full_attention"]
    config |= {
        "sliding_window_pattern": 2,
        "rope_theta": full["rope_theta"],
        "rope_scaling": {"rope_type": "linear", "factor": full["factor"]},
        "rope_local_base_freq": new["sliding_attention"]["rope_theta"],
    }
    (folder / "config.json").write_text(json.dumps(config))
    ids = random_ids(CASES["gemma3_text"], 2, 70)
    found = dump(folder, ids, "float32", tmp_path)["logits"]
    assert_logits_match(found, reference_logits(folder, ids, torch.float32))


def divergence(logits: torch.Tensor, reference: torch.Tensor) -> float:
    """Mean KL(logits || reference) in nats per token."""
    p, q = logits.double().log_softmax(-1), reference.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def assert_bfloat16_is_as_close(folder, ids: torch.Tensor, scratch) -> None:
    reference = reference_logits(folder, ids, torch.float32)
    theirs = divergence(reference_logits(folder, ids, torch.bfloat16), reference)
    ours = divergence(dump(folder, ids, "bfloat16", scratch)["logits"], reference)
    print(f"KL to float32: ours {ours:.3e}, transformers {theirs:.3e}")
    assert ours <= 1.5 * theirs + 1e-5


BFLOAT16_CASES = ["llama", "llama-llama3-rope", "qwen3", "qwen3_5", "qwen3_5_text", "mistral", "qwen2",
                  "qwen2-sliding", "gemma3", "gemma3_text", "gemma3_text-untied"]  # fmt: skip


@pytest.mark.parametrize("name", BFLOAT16_CASES)
def test_bfloat16_is_as_close_as_transformers(name, checkpoint, tmp_path):
    folder = checkpoint(name, torch.bfloat16)
    assert_bfloat16_is_as_close(folder, random_ids(CASES[name], 4, 130), tmp_path)


def test_bfloat16_of_bundled_model(bundled_ids, tmp_path):
    assert_bfloat16_is_as_close(bundled_model(), bundled_ids, tmp_path)


def within_body(name: str) -> str:
    """The name of a layer's tensor without the prefix, which files and modules spell differently."""
    head, layers, rest = name.partition("layers.")
    return layers + rest if layers else head


def assert_gradients_match(folder, ids: torch.Tensor, vocabulary: int, scratch, monkeypatch):
    direction = torch.randn(*ids.shape, vocabulary, dtype=torch.float64)
    found = dump(folder, ids, "float64", scratch, direction)
    model = load_model(folder, torch.float64)
    with float64_everywhere(model, monkeypatch):
        with torch.no_grad():
            own = model(ids, use_cache=False).logits
        unpack_experts(model)
        expected = gradients(model, ids, direction)
        assert torch.allclose(own, expected["logits"], rtol=1e-9, atol=1e-9)
    found = {within_body(name): tensor for name, tensor in found.items()}
    expected = {within_body(name): tensor for name, tensor in expected.items()}
    assert found.keys() == expected.keys()
    worst = 0.0
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float64 and found[name].shape == tensor.shape, name
        # The router of one expert per token has no gradient but rounding.
        error = (found[name] - tensor).abs().max().item() / max(tensor.abs().max().item(), 1e-4)
        assert error <= 1e-9, f"{name}: relative error {error}"
        worst = max(worst, error)
    print(f"worst relative error {worst:.1e}")


@pytest.mark.parametrize("name", CASES)
def test_float64_gradients(name, checkpoint, tmp_path, monkeypatch):
    torch.manual_seed(2)
    folder = checkpoint(name, torch.float32)
    ids = random_ids(CASES[name], 2, 70)
    assert_gradients_match(folder, ids, 96, tmp_path, monkeypatch)


def test_float64_gradients_of_bundled_model(bundled_ids, tmp_path, monkeypatch):
    torch.manual_seed(2)
    assert_gradients_match(bundled_model(), bundled_ids[:, :130], 2048, tmp_path, monkeypatch)


@pytest.mark.parametrize("dtype, floor", [("float32", 1e-5), ("bfloat16", 1e-3)])
def test_rounded_gradients_are_as_close_as_transformers(dtype, floor, checkpoint, tmp_path):
    torch.manual_seed(2)
    folder = checkpoint("qwen3_5", torch.bfloat16)
    ids = random_ids(CASES["qwen3_5"], 2, 70)
    direction = torch.randn(2, 70, 96).bfloat16()
    exact = dump(folder, ids, "float64", tmp_path, direction)
    ours = dump(folder, ids, dtype, tmp_path, direction)
    theirs = gradients(load_model(folder, getattr(torch, dtype)), ids, direction)
    for name in (n for n in exact if n.endswith((".g", ".dx", ".grad"))):
        scale = exact[name].norm()
        our_error = ((ours[name].double() - exact[name]).norm() / scale).item()
        their_error = ((theirs[name].double() - exact[name]).norm() / scale).item()
        print(f"{name}: relative error {our_error:.2e}, transformers {their_error:.2e}")
        assert our_error <= 1.5 * their_error + floor, name
