"""The whole model (text, images, MTP head, experts) against transformers, as it is and quantized.

sequence_dump runs a checkpoint on token ids and on the bundled captioned images; transformers runs in float32, with the MTP
head, which it does not read, wired here around its decoder layer. Errors are the largest over all positions and the whole
vocabulary, relative to the range of the expected logits.
"""

import copy
import functools
import importlib
import json
import os
import pathlib
import re
import subprocess

import numpy as np
import pytest
import torch
from reference_models import bundled_model, load_model
from safetensors.torch import load_file
from stored import decode, tensors
from transformers import AutoTokenizer

ROOT = pathlib.Path(os.environ["PRISMAQUANT_SOURCE_DIR"])
PROGRAM = pathlib.Path(os.environ["PRISMAQUANT_BINARY"])
SOURCES = {"dense": ROOT / "examples" / "tiny-qwen3_5", "mixture": ROOT / "examples" / "tiny-qwen3_5_moe"}
SAMPLES = bundled_model() / "samples"
CAPTIONS = [json.loads(line) for line in (SAMPLES / "captions.jsonl").read_text().splitlines()]
SEQUENCES, TOKENS = 2, 96
PARTS = {"body": "model.language_model.", "mtp": "mtp.", "visual": "model.visual."}
GROUP = {"nvfp4a16": 16, "int8": 128}  # columns
KERNEL_ROWS = 64  # of vLLM's weight-only kernel
EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj")
MODELS = pytest.mark.parametrize("model", SOURCES)
FORMATS = pytest.mark.parametrize("format_name", GROUP)
KINDS = pytest.mark.parametrize("kind", ["text", "image", "mtp"])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads that wait for each other stand still where other processes hold the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def call(program: pathlib.Path, *arguments) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]


# ---- The two sides


@functools.cache
def text_ids() -> torch.Tensor:
    """Held-out text, and ids drawn from the whole vocabulary but the special tokens."""
    tokenizer = AutoTokenizer.from_pretrained(SOURCES["dense"])
    text = tokenizer((bundled_model() / "heldout.txt").read_text(), add_special_tokens=False)["input_ids"][:TOKENS]
    drawn = torch.randint(0, tokenizer.vocab_size, (SEQUENCES - 1, TOKENS), generator=torch.Generator().manual_seed(5))
    return torch.cat([torch.tensor([text]), drawn])


@pytest.fixture(scope="module")
def dump(tmp_path_factory):
    """What sequence_dump writes for a checkpoint: see tests/tools/sequence_dump.cc."""
    work = tmp_path_factory.mktemp("dump")
    (work / "ids.json").write_text(json.dumps(text_ids().tolist()))

    @functools.cache
    def found(folder: pathlib.Path) -> dict:
        out = work / f"{folder.name}.safetensors"  # one each: the tensors are mapped, not read
        call(PROGRAM.parent / "sequence_dump", folder, work / "ids.json", SAMPLES, "float32", out)
        return load_file(out)

    return found


@pytest.fixture(scope="module")
def quantized(tmp_path_factory):
    """The folder of a model's quantized checkpoint, made on first use: all in one weight-only format, or "mixed"."""
    work = tmp_path_factory.mktemp("quantized")

    @functools.cache
    def make(model: str, kind: str) -> pathlib.Path:
        out = work / f"{model}-{kind}"
        choice = ["--uniform", kind]
        if kind == "mixed":
            choice = ["--bpp", "6.0", "--formats", "nvfp4,bf16", "--pin", r"layers\.0\.mlp\.experts=bf16"]
        call(PROGRAM, "quantize", SOURCES[model], out, "--calibration", bundled_model() / "calibration.txt",
             "--images", SAMPLES, "--samples", "4", "--tokens", "128", *choice, "--render", "rtn", "--no-eval",
             "--precision", "float32", "--threads", "1")
        return out

    return make


class GainNorm(torch.nn.Module):
    """(1 + w) x / rms(x)"""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight, self.eps = torch.nn.Parameter(torch.empty(size)), eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (1 + self.weight) * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


class Head(torch.nn.Module):
    """The MTP head: from the embedding of token i + 1 and the body's normed hidden state of token i to token i + 2."""

    def __init__(self, config, modeling, prefix: str):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        full = config.layer_types.index("full_attention")
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = GainNorm(size, eps), GainNorm(size, eps)
        self.fc = torch.nn.Linear(2 * size, size, bias=False)
        self.layers = torch.nn.ModuleList([getattr(modeling, prefix + "DecoderLayer")(config, full)])
        self.norm = GainNorm(size, eps)
        self.rotary = getattr(modeling, prefix + "TextRotaryEmbedding")(config)

    def forward(self, next_embedded: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(next_embedded), self.pre_fc_norm_hidden(hidden)], -1))
        slots = torch.arange(x.shape[1])
        later = torch.where(slots[None] > slots[:, None], -torch.inf, 0.0)[None, None]
        angles = self.rotary(x, slots.expand(3, 1, -1))
        return self.norm(self.layers[0](x, position_embeddings=angles, attention_mask=later))


class Reference:
    """transformers' model of a source checkpoint and the MTP head beside it, in float32."""

    def __init__(self, folder: pathlib.Path):
        self.model = load_model(folder, torch.float32)
        body = self.model.model
        modeling = importlib.import_module(type(body).__module__)
        self.mtp = Head(body.language_model.config, modeling, type(body).__name__.removesuffix("Model")).eval()
        weights = {name: tensor.float() for name, tensor in tensors(folder).items() if name.startswith("mtp.")}
        self.mtp.load_state_dict({name.removeprefix("mtp."): tensor for name, tensor in weights.items()})

    def weight(self, linear: str) -> torch.Tensor:
        """The weight of a Linear of that name, a part of a packed tensor for an expert's."""
        root = self.mtp if linear.startswith("mtp.") else self.model
        name = linear.removeprefix("mtp.")
        expert = EXPERT.fullmatch(name)
        if expert is None:
            return root.get_submodule(name).weight.data
        experts, index = root.get_submodule(expert[1]), int(expert[2])
        if expert[3] == "down":
            return experts.down_proj.data[index]
        gate, up = experts.gate_up_proj.data[index].chunk(2)
        return gate if expert[3] == "gate" else up

    @torch.no_grad()
    def text_logits(self, ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=ids[None], use_cache=False).logits[0]

    @torch.no_grad()
    def image_logits(self, ids: torch.Tensor, patches: torch.Tensor, grid: list) -> torch.Tensor:
        images = (ids == self.model.config.image_token_id).int()[None]
        inputs = {"input_ids": ids[None], "pixel_values": patches, "mm_token_type_ids": images}
        return self.model(**inputs, image_grid_thw=torch.tensor([[1, *grid]]), use_cache=False).logits[0]

    @torch.no_grad()
    def mtp_logits(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.model.model(input_ids=ids[None], use_cache=False).last_hidden_state
        embedded = self.model.get_input_embeddings()(ids[None])
        return self.model.lm_head(self.mtp(embedded[:, 1:], hidden[:, :-1]))[0]


@functools.cache
def reference(model: str) -> Reference:
    return Reference(SOURCES[model])


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.dtype == torch.float32 and found.shape == expected.shape
    return ((found - expected).abs().max() / (expected.max() - expected.min())).item()


def logits_of(found: dict, kind: str) -> dict:
    """The dumped logits of a kind by the sequence's name, of all sequences."""
    suffix = ".mtp_logits" if kind == "mtp" else ".logits"
    sequence = "caption" if kind == "image" else "text"
    logits = {name.removesuffix(suffix): tensor for name, tensor in found.items()
              if name.startswith(sequence) and name.endswith(suffix)}
    assert logits.keys() == {f"{sequence}.{n}" for n in range(len(CAPTIONS) if kind == "image" else SEQUENCES)}
    return logits


def expected_logits(oracle: Reference, found: dict, kind: str, sequence: str) -> torch.Tensor:
    if kind == "image":
        ids, patches, grid = (found[f"{sequence}.{key}"] for key in ("ids", "patches", "grid"))
        return oracle.image_logits(ids, patches, grid.tolist())
    ids = text_ids()[int(sequence.removeprefix("text."))]
    return oracle.mtp_logits(ids) if kind == "mtp" else oracle.text_logits(ids)


def assert_logits_match(found: dict, oracle: Reference, kind: str, bound: float) -> None:
    errors = [error(logits, expected_logits(oracle, found, kind, sequence))
              for sequence, logits in logits_of(found, kind).items()]
    print(f"largest error over the range, {kind}: {max(errors):.2e}")
    assert max(errors) <= bound


# ---- Checkpoints as they are


@KINDS
@MODELS
def test_logits(model, kind, dump):
    """float32 logits of the source: two text sequences, every captioned image, and the MTP head on the text.

    For an image transformers is given the ids, patches and grid that the program made; test_caption_ids and
    test_vision.py hold those to transformers' own.
    """
    assert_logits_match(dump(SOURCES[model]), reference(model), kind, 2e-5)


@MODELS
def test_caption_ids(model, dump):
    """Ids of every captioned image: transformers' tokenizer on the chat that the model's own template renders."""
    tokenizer = AutoTokenizer.from_pretrained(SOURCES[model])
    found = dump(SOURCES[model])
    assert len(CAPTIONS) > 0
    for n, caption in enumerate(CAPTIONS):
        rows, columns = found[f"caption.{n}.grid"].tolist()
        image = "<|vision_start|>" + "<|image_pad|>" * (rows * columns // 4) + "<|vision_end|>"
        text = (f"<|im_start|>user\n{image}{caption['prompt']}<|im_end|>\n"
                f"<|im_start|>assistant\n<think>\n\n</think>\n\n{caption['caption']}<|im_end|>")
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": caption["prompt"]}]}
        rendered = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True, enable_thinking=False)
        rendered = rendered.replace("<|image_pad|>", "<|image_pad|>" * (rows * columns // 4))
        assert text == rendered + caption["caption"] + "<|im_end|>"
        assert found[f"caption.{n}.ids"].tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


# ---- Quantized checkpoints


def decoded(stored: dict, linear: str) -> torch.Tensor:
    """The float32 weight of a quantized Linear, from what docs/formats.md says of its tensors."""
    packed = stored[linear + ".weight_packed"]
    if packed.dtype == torch.uint8:
        return decode(stored, linear)[1]
    assert packed.dtype == torch.int32
    rows, columns = stored[linear + ".weight_shape"].tolist()
    codes = np.frombuffer(packed.numpy().astype("<i4").tobytes(), np.uint8).reshape(rows, columns)
    scale = np.repeat(stored[linear + ".weight_scale"].float().numpy(), 128, axis=1)
    return torch.from_numpy((codes.astype(np.float32) - 128) * scale)


def quantized_linears(stored: dict) -> set[str]:
    return {name.removesuffix(".weight_scale") for name in stored if name.endswith(".weight_scale")}


def part_counts(linears: set[str]) -> dict[str, int]:
    counts = {part: sum(name.startswith(prefix) for name in linears) for part, prefix in PARTS.items()}
    assert sum(counts.values()) == len(linears)
    return counts | {"experts": sum(".experts." in name for name in linears)}


def experts_of(name: str, packed: torch.Tensor) -> dict[str, torch.Tensor]:
    """The weights, by the Linear's name, of which a packed tensor is made."""
    prefix = name.rsplit(".", 1)[0]
    if name.endswith(".down_proj"):
        return {f"{prefix}.{e}.down_proj": tensor for e, tensor in enumerate(packed)}
    halves = {"gate_proj": 0, "up_proj": 1}
    return {f"{prefix}.{e}.{half}": tensor.chunk(2)[h] for e, tensor in enumerate(packed) for half, h in halves.items()}


def is_packed(name: str) -> bool:
    return name.endswith((".experts.gate_up_proj", ".experts.down_proj"))


def linears_that_fit(source: dict, group: int) -> set[str]:
    """Linears whose columns make whole groups and whose rows suit the kernel."""
    linears = {}
    for name, tensor in source.items():
        if is_packed(name):
            linears |= experts_of(name, tensor)
        elif tensor.dim() == 2 and not name.endswith(("embed_tokens.weight", "pos_embed.weight", "lm_head.weight")):
            linears[name.removesuffix(".weight")] = tensor
    return {name for name, w in linears.items() if w.shape[0] % KERNEL_ROWS == 0 and w.shape[1] % group == 0}


@FORMATS
@MODELS
def test_what_is_quantized(model, format_name, quantized):
    """With one format for all, just the Linears that its shape rules admit are stored in it: in the body, its experts, the MTP
    head and the vision tower. (None of the mixture's experts has the 128 columns that INT8 groups need.)"""
    found = quantized_linears(tensors(quantized(model, format_name)))
    assert found == linears_that_fit(tensors(SOURCES[model]), GROUP[format_name])
    counts = part_counts(found)
    print(counts)
    assert min(counts[part] for part in PARTS) > 0
    assert (counts["experts"] > 0) == (model == "mixture" and format_name == "nvfp4a16")


@functools.cache
def quantized_reference(model: str, folder: pathlib.Path) -> Reference:
    """The source's reference with the decoded weights in the places of those that were quantized."""
    stored, oracle = tensors(folder), copy.deepcopy(reference(model))
    for linear in quantized_linears(stored):
        oracle.weight(linear).copy_(decoded(stored, linear))
    return oracle


@KINDS
@FORMATS
@MODELS
def test_quantized_logits(model, format_name, kind, quantized, dump):
    """float32 logits of a weight-only checkpoint: transformers' with the weights decoded from the stored bytes. That they
    differ from the source's in every sequence by more than the bound shows that they are those of other weights."""
    folder, bound = quantized(model, format_name), 5e-5
    found = dump(folder)
    assert_logits_match(found, quantized_reference(model, folder), kind, bound)
    source = logits_of(dump(SOURCES[model]), kind)
    changes = [error(logits, source[sequence]) for sequence, logits in logits_of(found, kind).items()]
    print(f"smallest change by quantization: {min(changes):.2e}")
    assert min(changes) > 2 * bound


# ---- What is not quantized


STORED = {"weight_packed", "weight_scale", "weight_global_scale", "input_global_scale", "weight_shape"}
CHECKPOINTS = [(model, kind) for model in SOURCES for kind in GROUP] + [("mixture", "mixed")]


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("model, kind", CHECKPOINTS)
def test_the_rest_is_bit_identical(model, kind, quantized):
    """Every tensor of the source but the weights of quantized Linears is there with the same dtype, shape and bits, and nothing
    else is. A packed tensor of a part with a quantized expert is replaced by the weights of its experts one by one, those that
    are not quantized bit for bit its slices."""
    source, stored = tensors(SOURCES[model]), tensors(quantized(model, kind))
    linears = quantized_linears(stored)
    opened = tuple(prefix for prefix in PARTS.values() if any(n.startswith(prefix) and ".experts." in n for n in linears))
    expected = {}
    for name, tensor in source.items():
        if is_packed(name) and name.startswith(opened):
            expected |= {linear + ".weight": weight for linear, weight in experts_of(name, tensor).items()}
        else:
            expected[name] = tensor
    for linear in linears:
        assert expected.pop(linear + ".weight").dim() == 2
    of_formats = {f"{linear}.{suffix}" for linear in linears for suffix in STORED}
    assert stored.keys() - of_formats == expected.keys()
    for name, tensor in expected.items():
        assert stored[name].dtype == tensor.dtype and stored[name].shape == tensor.shape, name
        assert bits(stored[name]) == bits(tensor), name


def test_experts_kept_beside_quantized_ones(quantized):
    """Where the pin keeps one layer's experts, these are written one by one in the source's dtype, each the slice of the packed
    tensor bit for bit, since the body's other experts are quantized; no packed tensor is left in the body."""
    source, stored = tensors(SOURCES["mixture"]), tensors(quantized("mixture", "mixed"))
    body = PARTS["body"]
    assert not [name for name in stored if name.startswith(body) and is_packed(name)]
    experts = [name for name in quantized_linears(stored) if name.startswith(body) and ".experts." in name]
    assert experts and not [name for name in experts if ".layers.0." in name]
    count = 0
    for packed in ("gate_up_proj", "down_proj"):
        name = f"{body}layers.0.mlp.experts.{packed}"
        for linear, weight in experts_of(name, source[name]).items():
            kept = stored[linear + ".weight"]
            assert kept.dtype == source[name].dtype and kept.shape == weight.shape, linear
            assert bits(kept) == bits(weight), linear
            count += 1
    assert count == 3 * len(source[name])
