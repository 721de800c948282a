"""Images and the vision tower of Qwen3.5 against Pillow and transformers."""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from reference_models import bundled_model, float64_everywhere
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers.image_utils import load_image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5Model, Qwen3_5VisionModel

PREFIX = "model.visual."
LEVEL = 1 / 255 / 0.5  # one step of an 8-bit pixel after normalization
SAMPLES = sorted((bundled_model() / "samples").glob("*.png"))


def program() -> str:
    return str(pathlib.Path(os.environ["PRISMAQUANT_BINARY"]).parent / "vision_dump")


def vision_dump(mode: str, *arguments, out: pathlib.Path, last=()) -> dict:
    """What the C++ program writes: see tests/tools/vision_dump.cc."""
    command = [program(), mode, *map(str, arguments), str(out), *map(str, last)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return load_file(out)


# ---- Images


def preprocessor(folder: pathlib.Path, patch: int = 16, frames: int = 2, merge: int = 2, **size):
    """Writes preprocessor_config.json; returns transformers' processor of it."""
    config = {
        "size": {"shortest_edge": 1, "longest_edge": 1 << 20, **size},
        "patch_size": patch,
        "temporal_patch_size": frames,
        "merge_size": merge,
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(config))
    return Qwen2VLImageProcessorPil.from_pretrained(folder)


def picture(width: int, height: int, seed: int = 0, bands: int = 3) -> np.ndarray:
    """Smooth shapes, hard edges and noise."""
    noise = np.random.default_rng(seed)
    y, x = np.mgrid[0:height, 0:width]
    phase = noise.uniform(0, 6, bands)
    waves = 127 + 90 * np.sin(x[..., None] / 7 + phase) * np.cos(y[..., None] / 11 + phase)
    waves[(x + y) % 23 < 4] = 255
    waves[(x - y) % 31 < 3] = 0
    return np.clip(waves + noise.normal(0, 12, waves.shape), 0, 255).astype(np.uint8)


def patches(folder, file, scratch) -> tuple[np.ndarray, list]:
    found = vision_dump("patches", folder, file, out=scratch / "patches.safetensors")
    return found["patches"].numpy(), found["grid"].tolist()


def assert_patches_equal(processor, folder, file, scratch) -> None:
    found, grid = patches(folder, file, scratch)
    expected = processor(load_image(str(file)), return_tensors="np")
    assert [1, *grid] == expected["image_grid_thw"][0].tolist()
    assert found.dtype == np.float32 and found.shape == expected["pixel_values"].shape
    assert np.abs(found - expected["pixel_values"]).max() <= 1e-2 * LEVEL


def one_bit(image):
    return image.convert("L").point(lambda v: 255 * (v > 99)).convert("1")


MODES = {
    "rgb": lambda image: image,
    "gray": lambda image: image.convert("L"),
    "one-bit": one_bit,
    "palette": lambda image: image.quantize(200),
    "palette-4-bit": lambda image: image.quantize(13),
    "alpha": lambda image: Image.fromarray(picture(64, 96, 1, 4), "RGBA"),
    "gray-alpha": lambda image: Image.fromarray(picture(64, 96, 1, 4), "RGBA").convert("LA"),
}


@pytest.mark.parametrize("mode", MODES)
def test_png_is_read_as_pillow_reads_it(mode, tmp_path):
    processor = preprocessor(tmp_path)
    MODES[mode](Image.fromarray(picture(64, 96))).save(tmp_path / "image.png")
    assert_patches_equal(processor, tmp_path, tmp_path / "image.png", tmp_path)


def test_transparent_colours_are_kept(tmp_path):
    processor = preprocessor(tmp_path)
    image = Image.fromarray(picture(64, 64)).quantize(50)
    image.save(tmp_path / "palette.png", transparency=bytes(range(50)))
    Image.fromarray(picture(64, 64)).save(tmp_path / "rgb.png", transparency=(255, 255, 255))
    for name in ("palette.png", "rgb.png"):
        assert_patches_equal(processor, tmp_path, tmp_path / name, tmp_path)


@pytest.mark.parametrize("size", [(64, 96), (70, 45), (31, 200), (500, 333), (9, 7), (1000, 20)])
def test_resizing_is_pillows(size, tmp_path):
    processor = preprocessor(tmp_path, shortest_edge=4096, longest_edge=65536)
    Image.fromarray(picture(*size, seed=size[0])).save(tmp_path / "image.png")
    assert_patches_equal(processor, tmp_path, tmp_path / "image.png", tmp_path)


@pytest.mark.parametrize("size", [(70, 45), (500, 333), (9, 7)])
def test_resizing_is_within_a_level_of_torchvisions_kernel(size, tmp_path):
    preprocessor(tmp_path, patch=1, frames=1, merge=1, longest_edge=40000, shortest_edge=4096)
    pixels = picture(*size, seed=size[0])
    Image.fromarray(pixels).save(tmp_path / "image.png")
    found, grid = patches(tmp_path, tmp_path / "image.png", tmp_path)
    levels = np.rint((found * 0.5 + np.array([0.5, 0.4, 0.3])) * 255).reshape(*grid, 3)
    source = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = torch.nn.functional.interpolate(
        source, size=grid, mode="bicubic", antialias=True, align_corners=False
    )
    difference = np.abs(levels - resized[0].permute(1, 2, 0).numpy())
    print(f"{size}: {100 * (difference > 0).mean():.2f}% of the levels differ")
    assert difference.max() <= 1


def test_target_sizes(tmp_path):
    processor = preprocessor(tmp_path, patch=2, frames=1, shortest_edge=64, longest_edge=900)
    for width, height in [(2, 2), (6, 10), (10, 6), (1, 200), (3, 500), (40, 40), (29, 31), (30, 30)]:
        Image.fromarray(picture(width, height)).save(tmp_path / "image.png")
        assert_patches_equal(processor, tmp_path, tmp_path / "image.png", tmp_path)


def jpeg_difference(image, tmp_path, **options) -> np.ndarray:
    """The differences to Pillow in levels, [height, width, 3]."""
    image.save(tmp_path / "image.jpg", **options)
    processor = preprocessor(tmp_path, patch=1, frames=1, merge=1)
    found, grid = patches(tmp_path, tmp_path / "image.jpg", tmp_path)
    expected = processor(load_image(str(tmp_path / "image.jpg")), return_tensors="np")
    assert [1, *grid] == expected["image_grid_thw"][0].tolist()
    difference = np.abs(found - expected["pixel_values"]).reshape(*grid, 3) / LEVEL
    print(f"{options}: largest {difference.max():.2f}, mean {difference.mean():.3f} levels")
    return difference


@pytest.mark.parametrize("quality, progressive", [(30, True), (95, False)])
@pytest.mark.parametrize("subsampling", ["4:4:4", "4:2:2", "4:2:0"])
@pytest.mark.parametrize("width", [96, 131])
def test_jpeg_is_close_to_pillows(width, subsampling, quality, progressive, tmp_path):
    image = Image.fromarray(picture(width, 97))
    difference = jpeg_difference(
        image, tmp_path, quality=quality, progressive=progressive, subsampling=subsampling
    )
    assert difference.mean() <= 0.25
    if subsampling == "4:2:2":  # stb weighs this column's chroma the wrong way round
        difference = np.delete(difference, (width - 1) // 2 * 2, axis=1)
    assert difference.max() <= 3.01


def test_gray_jpeg_is_close_to_pillows(tmp_path):
    image = Image.fromarray(picture(64, 64)).convert("L")
    assert jpeg_difference(image, tmp_path).max() <= 2.01


@pytest.mark.parametrize("orientation", range(1, 9))
def test_jpeg_is_turned_upright(orientation, tmp_path):
    for endian in "<>":
        exif = Image.Exif()
        exif.endian = endian
        exif[0x010F] = "a maker"
        exif[0x0112] = orientation
        image = Image.fromarray(picture(40, 24))
        assert jpeg_difference(image, tmp_path, exif=exif, subsampling=0).max() <= 3.01


@pytest.mark.parametrize("file", SAMPLES, ids=lambda file: file.stem)
def test_patches_of_bundled_samples(file, tmp_path):
    processor = Qwen2VLImageProcessorPil.from_pretrained(bundled_model())
    assert_patches_equal(processor, bundled_model(), file, tmp_path)


# ---- The tower

BASE = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 24,
    "num_position_embeddings": 36,
}
CASES = {
    "square": ({}, (6, 6)),
    "wide": ({}, (2, 12)),
    "high": ({"depth": 3}, (10, 4)),
    "one-token": ({"depth": 1}, (2, 2)),
    "one-head": ({"num_heads": 1, "num_position_embeddings": 9}, (4, 6)),
    "narrow-heads": ({"num_heads": 8, "num_position_embeddings": 1}, (4, 6)),
    "heads-of-12": ({"hidden_size": 36, "num_heads": 3, "out_hidden_size": 40}, (8, 2)),
    "no-merging": ({"spatial_merge_size": 1}, (3, 5)),
    "merging-9": ({"spatial_merge_size": 3, "temporal_patch_size": 1}, (3, 9)),
    "large-patches": ({"patch_size": 16, "intermediate_size": 72}, (4, 4)),
    "another-theta": ({"rope_parameters": {"rope_type": "axial", "rope_theta": 300.0}}, (4, 8)),
}


def make_tower(name: str, folder: pathlib.Path, dtype: torch.dtype) -> pathlib.Path:
    """A checkpoint that holds a random tower, its preprocessor_config.json and an image."""
    changes, (rows, columns) = CASES[name]
    config = transformers.models.qwen3_5.Qwen3_5VisionConfig(**{**BASE, **changes})
    torch.manual_seed(len(name))
    model = Qwen3_5VisionModel(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                std = 1.0 if key.startswith("pos_embed") else 1.5 / parameter[0].numel() ** 0.5
                parameter.normal_(std=std)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    weights = {PREFIX + key: value.to(dtype) for key, value in model.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"vision_config": config.to_dict()}))
    patch, merge = config.patch_size, config.spatial_merge_size
    preprocessor(folder, patch=patch, frames=config.temporal_patch_size, merge=merge)
    Image.fromarray(picture(columns * patch, rows * patch)).save(folder / "image.png")
    return folder


def tower_weights(folder: pathlib.Path) -> dict:
    weights = {}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as tensors:
            names = [name for name in tensors.keys() if name.startswith(PREFIX)]
            weights |= {name.removeprefix(PREFIX): tensors.get_tensor(name) for name in names}
    return weights


def load_tower(folder: pathlib.Path, dtype: torch.dtype) -> Qwen3_5VisionModel:
    """As from_pretrained loads it: parameters in `dtype`, rotary frequencies in float32."""
    keys = json.loads((folder / "config.json").read_text())["vision_config"]
    keys = {key: value for key, value in keys.items() if key not in ("model_type", "dtype")}
    keys.pop("deepstack_visual_indexes", None)
    config = transformers.models.qwen3_5.Qwen3_5VisionConfig(**keys)
    config._attn_implementation = "eager"
    model = Qwen3_5VisionModel(config)
    model.load_state_dict(tower_weights(folder))
    model.to(dtype)
    rotary = model.rotary_pos_emb
    rotary.inv_freq = rotary.compute_axial_rope_parameters(config)[0]
    return model.eval()


def reference_output(folder, found: dict, dtype: torch.dtype) -> torch.Tensor:
    grid = torch.tensor([[1, *found["grid"].tolist()]])
    with torch.no_grad():
        return load_tower(folder, dtype)(found["patches"], grid).pooler_output


def tower(folder, image, dtype: str, scratch, direction=None) -> dict:
    out, last = scratch / "tower.safetensors", ()
    if direction is not None:
        last = (scratch / "direction.safetensors",)
        save_file({"direction": direction}, last[0])
    return vision_dump("tower", folder, image, dtype, out=out, last=last)


def assert_float32_matches(folder, image, scratch) -> None:
    found = tower(folder, image, "float32", scratch)
    expected = reference_output(folder, found, torch.float32)
    output = found["output"]
    assert output.dtype == torch.float32 and output.shape == (1, *expected.shape)
    error = (output[0] - expected).abs().max() / (expected.max() - expected.min())
    print(f"largest error over the range: {error:.2e}")
    assert error <= 2e-5


@pytest.mark.parametrize("name", CASES)
def test_float32_output(name, tmp_path):
    folder = make_tower(name, tmp_path, torch.float32)
    assert_float32_matches(folder, folder / "image.png", tmp_path)


@pytest.mark.parametrize("file", SAMPLES, ids=lambda file: file.stem)
def test_float32_output_of_bundled_model(file, tmp_path):
    assert_float32_matches(bundled_model(), file, tmp_path)


def assert_bfloat16_is_as_close(folder, image, scratch) -> None:
    ours = tower(folder, image, "bfloat16", scratch)
    exact = reference_output(folder, ours, torch.float32)
    theirs = reference_output(folder, ours, torch.bfloat16)
    assert ours["output"].dtype == torch.bfloat16
    our_error = ((ours["output"][0].float() - exact).norm() / exact.norm()).item()
    their_error = ((theirs.float() - exact).norm() / exact.norm()).item()
    print(f"relative error: ours {our_error:.2e}, transformers {their_error:.2e}")
    assert our_error <= 1.5 * their_error + 1e-3


@pytest.mark.parametrize("name", CASES)
def test_bfloat16_is_as_close_as_transformers(name, tmp_path):
    folder = make_tower(name, tmp_path, torch.bfloat16)
    assert_bfloat16_is_as_close(folder, folder / "image.png", tmp_path)


def test_bfloat16_of_bundled_model(tmp_path):
    for file in SAMPLES[:3]:
        assert_bfloat16_is_as_close(bundled_model(), file, tmp_path)


def reference_gradients(model, patches, grid, direction) -> dict:
    """The tensors that vision_dump writes, by transformers' autograd."""
    records, embedded = {}, []

    def keep(name):
        def hook(_, inputs, output):
            output.retain_grad()
            records[PREFIX + name] = (inputs[0].detach(), output)

        return hook

    def cut(_, inputs):
        embedded.append(inputs[0].detach().requires_grad_())
        return (embedded[0], *inputs[1:])

    linears = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    for name, linear in linears.items():
        linear.register_forward_hook(keep(name))
    model.blocks[0].register_forward_pre_hook(cut)
    output = model(patches, torch.tensor([[1, *grid.tolist()]])).pooler_output
    (output * direction).sum().backward()
    out = {"output": output.detach(), "embeddings": embedded[0].detach()}
    out["embeddings.grad"] = embedded[0].grad
    for name, (x, y) in records.items():
        weight = linears[name.removeprefix(PREFIX)].weight.detach()
        out |= {name + ".x": x, name + ".g": y.grad, name + ".dx": y.grad @ weight}
    return out


def assert_gradients_match(folder, image, scratch, monkeypatch) -> None:
    shape = tower(folder, image, "float32", scratch)["output"].shape
    torch.manual_seed(3)
    direction = torch.randn(shape, dtype=torch.float64)
    found = tower(folder, image, "float64", scratch, direction)
    model = load_tower(folder, torch.float64)
    with float64_everywhere(model, monkeypatch):
        expected = reference_gradients(model, found.pop("patches"), found.pop("grid"), direction[0])
    assert found.keys() == expected.keys()
    worst = 0
    for name, tensor in expected.items():
        assert found[name].dtype == torch.float64 and found[name].shape == (1, *tensor.shape), name
        error = ((found[name][0] - tensor).abs().max() / tensor.abs().max()).item()
        worst = max(worst, error)
        assert error <= 1e-8, f"{name}: relative error {error}"
    print(f"largest relative error {worst:.1e}")


@pytest.mark.parametrize("name", CASES)
def test_float64_gradients(name, tmp_path, monkeypatch):
    folder = make_tower(name, tmp_path, torch.float32)
    assert_gradients_match(folder, folder / "image.png", tmp_path, monkeypatch)


@pytest.mark.parametrize("file", SAMPLES[:2], ids=lambda file: file.stem)
def test_float64_gradients_of_bundled_model(file, tmp_path, monkeypatch):
    assert_gradients_match(bundled_model(), file, tmp_path, monkeypatch)


# ---- Positions


@pytest.mark.parametrize("before, after", [(4, 7), (0, 3), (5, 0)])
@pytest.mark.parametrize("grid", [(4, 6), (10, 2), (2, 2)])
def test_rotary_positions(before, after, grid, tmp_path):
    image_token, merge = 77, 2
    ids = [1] * before + [image_token] * (grid[0] * grid[1] // merge**2) + [2] * after
    (tmp_path / "ids.json").write_text(json.dumps(ids))
    found = vision_dump(
        "positions", tmp_path / "ids.json", image_token, *grid, merge, out=tmp_path / "positions"
    )["positions"]
    config = transformers.Qwen3_5Config(vision_config={"spatial_merge_size": merge})
    model = Qwen3_5Model.__new__(Qwen3_5Model)
    torch.nn.Module.__init__(model)
    model.config = config
    tokens = torch.tensor([ids])
    expected, _ = model.get_rope_index(
        tokens, (tokens == image_token).int(), image_grid_thw=torch.tensor([[1, *grid]])
    )
    assert found.dtype == torch.int64 and torch.equal(found, expected[:, 0])
