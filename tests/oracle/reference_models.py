"""Small random checkpoints of every supported family, and transformers' results on them.

A case is a dict: `family`, whether to `tie` the head, configuration keys that differ from the
family's base, and prefixes of tensors to `rename` in the file. Weights are scaled so that every operation matters: random gains, wide activations.
"""

import contextlib
import json
import os
import pathlib
import subprocess

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

BASE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 512,
}
DELTA_NET = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_conv_kernel_dim": 4,
    "head_dim": 32,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1],
        "mrope_interleaved": True,
    },
}
MIXTURE = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "norm_topk_prob": True,
}
WINDOW = 16
GEMMA = {
    "hidden_size": 72,
    "num_hidden_layers": 3,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 24,
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
}
LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.5}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def dump_program() -> str:
    return str(pathlib.Path(os.environ["PRISMAQUANT_BINARY"]).parent / "model_dump")


def bundled_model() -> pathlib.Path:
    return pathlib.Path(os.environ["PRISMAQUANT_SOURCE_DIR"]) / "examples" / "tiny-qwen3_5"


def _config(case: dict) -> transformers.PretrainedConfig:
    family = case["family"]
    keys = {**BASE, **case.get("config", {})}
    tie = case.get("tie", False)
    if family == "llama":
        return transformers.LlamaConfig(**keys, tie_word_embeddings=tie)
    if family == "mistral":
        return transformers.MistralConfig(**keys, tie_word_embeddings=tie)
    if family == "qwen2":
        return transformers.Qwen2Config(**keys, tie_word_embeddings=tie)
    if family == "qwen3":
        return transformers.Qwen3Config(**keys, tie_word_embeddings=tie)
    if family == "qwen3_moe":
        return transformers.Qwen3MoeConfig(**{**BASE, **MIXTURE, **case.get("config", {})}, tie_word_embeddings=tie)
    if family.startswith("gemma3"):
        return _gemma_config({**BASE, **GEMMA, **case.get("config", {})}, tie, "text" in family)
    moe = "moe" in family
    keys = {**BASE, **DELTA_NET, **(MIXTURE if moe else {}), **case.get("config", {})}
    text_class = transformers.Qwen3_5MoeTextConfig if moe else transformers.Qwen3_5TextConfig
    text = text_class(**keys, tie_word_embeddings=tie)
    if family.endswith("_text"):
        return text
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 1,
        "out_hidden_size": keys["hidden_size"],
        "num_position_embeddings": 16,
    }
    whole_class = transformers.Qwen3_5MoeConfig if moe else transformers.Qwen3_5Config
    return whole_class(
        text_config=text.to_dict(), vision_config=vision, tie_word_embeddings=tie
    )


def _gemma_config(keys: dict, tie: bool, text_only: bool) -> transformers.PretrainedConfig:
    text = transformers.Gemma3TextConfig(**keys, tie_word_embeddings=tie)
    if text_only:
        return text
    vision = {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "image_size": 28,
        "patch_size": 14,
    }
    return transformers.Gemma3Config(
        text_config=text.to_dict(),
        vision_config=vision,
        mm_tokens_per_image=4,
        image_token_index=keys["vocab_size"] - 1,
        tie_word_embeddings=tie,
    )


CLASSES = {
    "gemma3": transformers.Gemma3ForConditionalGeneration,
    "gemma3_text": transformers.Gemma3ForCausalLM,
    "llama": transformers.LlamaForCausalLM,
    "mistral": transformers.MistralForCausalLM,
    "qwen2": transformers.Qwen2ForCausalLM,
    "qwen3": transformers.Qwen3ForCausalLM,
    "qwen3_5": transformers.Qwen3_5ForConditionalGeneration,
    "qwen3_5_text": transformers.Qwen3_5ForCausalLM,
    "qwen3_5_moe": transformers.Qwen3_5MoeForConditionalGeneration,
    "qwen3_5_moe_text": transformers.Qwen3_5MoeForCausalLM,
    "qwen3_moe": transformers.Qwen3MoeForCausalLM,
}


def make_checkpoint(case: dict, folder: pathlib.Path, dtype: torch.dtype) -> pathlib.Path:
    """Writes the case's checkpoint; in bfloat16, A_log and gated norms stay float32 as in Qwen3.5."""
    torch.manual_seed(case.get("seed", 1))
    model = CLASSES[case["family"]](_config(case))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter.shape[-1] if ".experts." in name else parameter[0].numel()
                parameter.normal_(std=1.5 / fan_in**0.5)
            elif not name.endswith("A_log"):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    model.to(dtype).save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(("A_log", "linear_attn.norm.weight")):
            weights[name] = weight.float()
    for old, new in case.get("rename", {}).items():
        weights = {
            new + name.removeprefix(old) if name.startswith(old) else name: weight
            for name, weight in weights.items()
        }
    save_file(weights, folder / "model.safetensors")
    return folder


def load_model(folder: pathlib.Path, dtype: torch.dtype) -> torch.nn.Module:
    architecture = json.loads((folder / "config.json").read_text())["architectures"][0]
    model_class = getattr(transformers, architecture)
    model = model_class.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()
    if any(hasattr(module, "experts") for module in model.modules()):
        model.set_experts_implementation("eager")  # the grouped product has no float64
    return model


def random_ids(case: dict, sequences: int, tokens: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(tokens)
    vocabulary = case.get("config", {}).get("vocab_size", BASE["vocab_size"])
    return torch.randint(0, vocabulary, (sequences, tokens), generator=generator)


def dump(folder, ids, dtype: str, scratch, direction=None) -> dict:
    """What the C++ model computes: see tests/tools/model_dump.cc."""
    ids_file, out = scratch / "ids.json", scratch / "dump.safetensors"
    ids_file.write_text(json.dumps(ids.tolist()))
    arguments = [dump_program(), str(folder), str(ids_file), dtype, str(out)]
    if direction is not None:
        save_file({"direction": direction}, scratch / "direction.safetensors")
        arguments.append(str(scratch / "direction.safetensors"))
    done = subprocess.run(arguments, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with safe_open(out, "pt") as file:
        return {name: file.get_tensor(name).clone() for name in file.keys()}


class _DoubleTorch:
    """The torch module with float32 meaning float64."""

    def __getattr__(self, name):
        return torch.float64 if name in ("float32", "float") else getattr(torch, name)


def recurrent_gated_delta(query, key, value, g, beta, **_):
    """The gated delta rule token by token in the inputs' own precision."""
    repeats = value.shape[2] // key.shape[2]

    def unit(x):
        return x / torch.sqrt((x * x).sum(-1, keepdim=True) + 1e-6)

    query = unit(query).repeat_interleave(repeats, 2) / key.shape[-1] ** 0.5
    key = unit(key).repeat_interleave(repeats, 2)
    state = value.new_zeros(*value.shape[:1], value.shape[2], key.shape[-1], value.shape[-1])
    outputs = []
    for t in range(value.shape[1]):
        state = state * g[:, t].exp()[..., None, None]
        held = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        written = beta[:, t, :, None] * (value[:, t] - held)
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], written)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]))
    return torch.stack(outputs, 1), None


@contextlib.contextmanager
def float64_everywhere(model, monkeypatch):
    """Lifts transformers' inner float32 casts to float64, all but the rotary angles."""
    single = torch.Tensor.float
    modules = {type(m).__module__ for m in model.modules()}
    with monkeypatch.context() as patch:
        for name in (n for n in modules if ".modeling_" in n):
            module = __import__(name, fromlist=["torch"])
            patch.setattr(module, "torch", _DoubleTorch())
            if hasattr(module, "torch_chunk_gated_delta_rule"):
                patch.setattr(module, "torch_chunk_gated_delta_rule", recurrent_gated_delta)
        for rotary in model.modules():
            if not type(rotary).__name__.endswith("RotaryEmbedding"):
                continue

            module = __import__(type(rotary).__module__, fromlist=["torch"])

            def forward(*args, inner=rotary.forward, module=module, **kwargs):
                with monkeypatch.context() as restore:
                    restore.setattr(torch.Tensor, "float", single)
                    restore.setattr(module, "torch", torch)
                    return inner(*args, **kwargs)

            patch.setattr(rotary, "forward", forward)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


class PlainMixture(torch.nn.Module):
    """A mixture of experts as a loop over experts, each projection a Linear of its own."""

    def __init__(self, block, per_token: int, normalize: bool):
        super().__init__()
        self.per_token, self.normalize = per_token, normalize
        self.gate = self.linear(block.gate.weight)
        packed = block.experts
        size = packed.down_proj.shape[-1]
        self.experts = torch.nn.ModuleList()
        for e in range(packed.down_proj.shape[0]):
            expert = torch.nn.Module()
            expert.gate_proj = self.linear(packed.gate_up_proj[e, :size])
            expert.up_proj = self.linear(packed.gate_up_proj[e, size:])
            expert.down_proj = self.linear(packed.down_proj[e])
            self.experts.append(expert)
        self.shared = hasattr(block, "shared_expert")
        if self.shared:
            self.shared_expert, self.shared_expert_gate = block.shared_expert, block.shared_expert_gate

    @staticmethod
    def linear(weight):
        out, inputs = weight.shape
        linear = torch.nn.Linear(inputs, out, bias=False, dtype=weight.dtype)
        linear.weight = torch.nn.Parameter(weight.detach().clone())
        return linear

    def forward(self, x):
        tokens = x.flatten(0, -2)
        p = torch.softmax(self.gate(x).flatten(0, -2).double(), -1)
        weights, chosen = torch.topk(p, self.per_token)
        if self.normalize:
            weights = weights / weights.sum(-1, keepdim=True)
        y = torch.zeros_like(tokens)
        for e, expert in enumerate(self.experts):
            rows, places = torch.where(chosen == e)
            if len(rows) == 0:
                continue
            inner = torch.nn.functional.silu(expert.gate_proj(tokens[rows])) * expert.up_proj(tokens[rows])
            y = y.index_add(0, rows, expert.down_proj(inner) * weights[rows, places, None].to(x.dtype))
        y = y.view(x.shape)
        if self.shared:
            y = y + torch.sigmoid(self.shared_expert_gate(x)) * self.shared_expert(x)
        return y


def unpack_experts(model) -> None:
    """Puts a PlainMixture in the place of every mixture of transformers'."""
    config = model.config.get_text_config()
    for module in list(model.modules()):
        block = getattr(module, "mlp", None)
        if block is not None and hasattr(block, "experts"):
            module.mlp = PlainMixture(block, config.num_experts_per_tok, getattr(config, "norm_topk_prob", True))


def gradients(model, ids: torch.Tensor, direction: torch.Tensor) -> dict:
    """The tensors that model_dump writes, by transformers' autograd."""
    records, out = {}, {}

    def keep(name):
        def hook(_, inputs, output):
            output.retain_grad()
            records[name] = (inputs[0].detach(), output)

        return hook

    hooks = [
        module.register_forward_hook(keep(name))
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in name
    ]
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    logits = model(inputs_embeds=embedded, use_cache=False).logits
    (logits * direction).sum().backward()
    for hook in hooks:
        hook.remove()
    out["logits"], out["embeddings.grad"] = logits.detach(), embedded.grad
    weights = dict(model.named_parameters())
    for name, (x, y) in records.items():
        out[name + ".x"], out[name + ".g"] = x, y.grad
        out[name + ".dx"] = y.grad @ weights[name + ".weight"].detach()
    return out
