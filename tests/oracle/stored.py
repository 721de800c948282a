"""What the tensors of a checkpoint mean, from the definition of the formats alone (docs/formats.md)."""

import pathlib

import torch
from safetensors import safe_open

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def tensors(folder) -> dict[str, torch.Tensor]:
    """All tensors of a folder's *.safetensors."""
    found = {}
    for path in sorted(pathlib.Path(folder).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            for name in file.keys():
                assert name not in found, name
                found[name] = file.get_tensor(name)
    return found


def decode(stored: dict, linear: str) -> tuple[str, torch.Tensor]:
    """Format and float32 weight of a Linear."""
    packed, scale = stored.get(linear + ".weight_packed"), stored.get(linear + ".weight_scale")
    if packed is not None and packed.dtype == torch.int32:
        out, columns = stored[linear + ".weight_shape"].tolist()
        bits = 32 * packed.shape[1] // columns
        places = torch.arange(0, 32, bits)
        codes = (packed[..., None] >> places & (1 << bits) - 1).flatten(-2) - (1 << bits - 1)
        return f"int{bits}", (codes.unflatten(-1, (-1, 128)) * scale.float()[..., None]).flatten(-2)
    if packed is not None and scale.dtype == torch.uint8:
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
        scale = torch.exp2(scale.float() - 127)
        return "mxfp4", (E2M1[codes].unflatten(-1, (-1, 32)) * scale[..., None]).flatten(-2)
    if packed is not None:
        codes = torch.stack([packed & 15, packed >> 4], -1).flatten(-2).long()
        scale = scale.float() / stored[linear + ".weight_global_scale"]
        kind = "nvfp4" if linear + ".input_global_scale" in stored else "nvfp4a16"
        return kind, (E2M1[codes].unflatten(-1, (-1, 16)) * scale[..., None]).flatten(-2)
    weight = stored[linear + ".weight"]
    if scale is None:
        return "bf16", weight.float()
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
        return "mxfp8", (weight.float().unflatten(-1, (-1, 32)) * scale[..., None]).flatten(-2)
    return "fp8", weight.float() * scale.float()


def round_to_e2m1(x: torch.Tensor) -> torch.Tensor:
    """Nearest value of the grid, ties to the even code."""
    grid = E2M1[:8]
    below = (torch.bucketize(x.abs(), grid, right=True) - 1).clamp(max=6)
    middle = (grid[below] + grid[below + 1]) / 2
    up = (x.abs() > middle) | ((x.abs() == middle) & (below % 2 == 1))
    return grid[below + up.long()].copysign(x)
