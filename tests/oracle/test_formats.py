"""Number formats against compressed-tensors: every operator must give its bits when both get float32."""

import os

import pytest
import torch
from compressed_tensors.compressors.mxfp4.base import MXFP4PackedCompressor
from compressed_tensors.compressors.mxfp8.base import MXFP8QuantizationCompressor
from compressed_tensors.compressors.naive_quantized.base import FloatQuantizationCompressor
from compressed_tensors.compressors.nvfp4.base import NVFP4PackedCompressor
from compressed_tensors.compressors.pack_quantized.base import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationScheme, preset_name_to_scheme
from compressed_tensors.quantization.lifecycle.forward import fake_quantize
from compressed_tensors.quantization.utils.helpers import (
    calculate_qparams,
    compute_dynamic_scales_and_zp,
    generate_gparam,
)

torch.ops.load_library(os.environ["PRISMAQUANT_OPS"])
OPS = torch.ops.prismaquant

E2M1_TIES = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0]
SHAPES = [(1, 16), (1, 32), (3, 48), (5, 64), (1, 128), (7, 160), (3, 384), (33, 1024), (2, 4304), (64, 1), (4, 17)]
INT_PRESETS = {4: "W4A16", 8: "W8A16"}


def scheme(preset: str) -> QuantizationScheme:
    return preset_name_to_scheme(preset, ["Linear"])


def fill(kind: str, shape: tuple[int, int]) -> torch.Tensor:
    """A float32 tensor of one kind; deterministic."""
    generator = torch.Generator().manual_seed(len(kind) * 1000 + shape[0] * 7 + shape[1])
    normal = torch.randn(shape, generator=generator)
    if kind == "normal":
        return normal
    if kind == "bf16":
        return (normal * 0.02).bfloat16().float()
    if kind == "heavy_tail":
        return normal / torch.rand(shape, generator=generator).clamp_min(1e-6)
    if kind == "spread":
        return normal * torch.exp2(torch.randint(-60, 60, shape, generator=generator).float())
    if kind == "row_spread":
        rows = torch.exp2(torch.randint(-100, 100, (shape[0], 1), generator=generator).float())
        return normal * rows
    if kind == "outlier":
        normal[0, 0] = -1e4
        return normal
    if kind == "huge":
        return normal * 1e37
    if kind == "tiny":
        return normal * 1e-37
    if kind == "subnormal":
        return normal * 1e-41
    if kind == "zero":
        return torch.zeros(shape)
    if kind == "negative_zero":
        return torch.where(normal > 0, -torch.zeros(shape), normal)
    if kind == "some_zero_groups":
        normal[:, : shape[1] // 2] = 0
        return normal
    if kind == "ties":
        # 6 opens every group of 16, so quotients of the other elements are exact ties of E2M1.
        choice = torch.randint(0, len(E2M1_TIES), shape, generator=generator)
        ties = torch.tensor(E2M1_TIES)[choice] * torch.sign(normal)
        ties[:, ::16] = 6
        return ties
    if kind == "e4m3_ties":
        # 448 opens every group of 32; the others lie half-way between neighbours of E4M3.
        exponent = torch.randint(-10, 9, shape, generator=generator).float()
        odd = torch.randint(0, 8, shape, generator=generator).float() * 2 + 17
        ties = torch.sign(normal) * odd / 16 * torch.exp2(exponent)
        ties = ties.clamp(-448, 448)
        ties[:, ::32] = 448
        return ties
    if kind == "int_ties":
        # Half-way between integers under a power of two: of INT4 in even groups of 128, of INT8 in odd ones.
        largest = torch.where(torch.arange(shape[1]) // 128 % 2 == 0, 8.0, 128.0)
        ties = ((torch.rand(shape, generator=generator) * 2 - 1) * largest).floor() + 0.5
        ties[:, ::128] = largest[::128] - 0.5
        return ties * torch.exp2(torch.randint(-8, 8, (shape[0], 1), generator=generator).float())
    if kind == "powers":
        # Around the threshold of 1.75 at which the E8M0 scale is promoted.
        mantissa = torch.tensor([1.0, 1.7499999, 1.75, 1.7500001, 1.9999999])
        choice = torch.randint(0, 5, shape, generator=generator)
        exponent = torch.randint(-130, 126, (shape[0], 1), generator=generator).float()
        return mantissa[choice] * torch.exp2(exponent)
    raise ValueError(kind)


KINDS = [
    "normal",
    "bf16",
    "heavy_tail",
    "spread",
    "row_spread",
    "outlier",
    "huge",
    "tiny",
    "subnormal",
    "zero",
    "negative_zero",
    "some_zero_groups",
    "ties",
    "e4m3_ties",
    "int_ties",
    "powers",
]


def cases(group: int) -> list:
    return [(kind, shape) for kind in KINDS for shape in SHAPES if shape[1] % group == 0]


def assert_bits(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal dtype, shape and bits: -0 is not 0."""
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    size = found.element_size()
    kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[size]
    different = found.contiguous().view(kind) != expected.contiguous().view(kind)
    if different.any():
        at = tuple(int(i) for i in different.nonzero()[0])
        pytest.fail(
            f"{int(different.sum())} of {found.numel()} differ, first at {at}: "
            f"found {found[at].item()!r}, expected {expected[at].item()!r}"
        )


def grouped_range(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    groups = weight.unflatten(-1, (-1, group))
    return groups.amin(-1), groups.amax(-1)


def nvfp4_global(tensor: torch.Tensor) -> torch.Tensor:
    return generate_gparam(tensor.amin(), tensor.amax())


@pytest.mark.parametrize(("kind", "shape"), cases(16))
def test_nvfp4_weight(kind, shape):
    weight, args = fill(kind, shape), scheme("NVFP4").weights
    global_scale = nvfp4_global(weight)
    scale, _ = calculate_qparams(*grouped_range(weight, 16), args, global_scale=global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    expected = NVFP4PackedCompressor.compress(state, scheme("NVFP4"))
    packed, found_scale = OPS.nvfp4_encode(weight, global_scale.item())
    assert_bits(found_scale, expected["weight_scale"])
    assert_bits(packed, expected["weight_packed"])


@pytest.mark.parametrize("factor", [1.0, 4.0, 1e4])
@pytest.mark.parametrize("kind", ["normal", "ties", "some_zero_groups"])
def test_nvfp4_weight_under_a_sibling_s_global_scale(kind, factor):
    weight, args = fill(kind, (9, 96)), scheme("NVFP4").weights
    global_scale = nvfp4_global(weight * factor)
    scale, _ = calculate_qparams(*grouped_range(weight, 16), args, global_scale=global_scale)
    state = {"weight": weight, "weight_scale": scale, "weight_global_scale": global_scale}
    expected = NVFP4PackedCompressor.compress(state, scheme("NVFP4"))
    packed, found_scale = OPS.nvfp4_encode(weight, global_scale.item())
    assert_bits(found_scale, expected["weight_scale"])
    assert_bits(packed, expected["weight_packed"])


@pytest.mark.parametrize(("kind", "shape"), cases(32))
def test_mxfp8_weight(kind, shape):
    weight, args = fill(kind, shape), scheme("MXFP8").weights
    scale, _ = calculate_qparams(*grouped_range(weight, 32), args)
    state = {"weight": weight, "weight_scale": scale}
    expected = MXFP8QuantizationCompressor.compress(state, scheme("MXFP8"))
    codes, found_scale = OPS.mxfp8_encode(weight)
    assert_bits(found_scale, expected["weight_scale"])
    assert_bits(codes, expected["weight"])


@pytest.mark.parametrize(("kind", "shape"), cases(32))
def test_mxfp4_weight(kind, shape):
    weight, args = fill(kind, shape), scheme("MXFP4").weights
    scale, _ = calculate_qparams(*grouped_range(weight, 32), args)
    state = {"weight": weight, "weight_scale": scale}
    expected = MXFP4PackedCompressor.compress(state, scheme("MXFP4"))
    packed, found_scale = OPS.mxfp4_encode(weight)
    assert_bits(found_scale, expected["weight_scale"])
    assert_bits(packed, expected["weight_packed"])


def int_scale(weight: torch.Tensor, bits: int) -> torch.Tensor:
    return calculate_qparams(*grouped_range(weight, 128), scheme(INT_PRESETS[bits]).weights)[0]


def int_compress(weight: torch.Tensor, scale: torch.Tensor, bits: int) -> dict:
    return PackedQuantizationCompressor.compress({"weight": weight, "weight_scale": scale}, scheme(INT_PRESETS[bits]))


@pytest.mark.parametrize("bits", INT_PRESETS)
@pytest.mark.parametrize(("kind", "shape"), cases(128))
def test_int_weight(kind, shape, bits):
    weight = fill(kind, shape)
    expected = int_compress(weight, int_scale(weight, bits), bits)
    packed, scale = OPS.int_encode(weight, bits, torch.float32)
    assert_bits(scale, expected["weight_scale"])
    assert_bits(packed, expected["weight_packed"])
    assert expected["weight_shape"].tolist() == list(shape)


@pytest.mark.parametrize("bits", INT_PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_int_scale_of_a_bfloat16_weight_and_codes_of_the_same_weight_widened(kind, bits):
    # Given a bfloat16 weight, compressed-tensors rounds the quotients to bfloat16 before it takes the nearest code.
    weight = fill(kind, (33, 1024)).bfloat16()
    stored = int_scale(weight, bits)
    packed, scale = OPS.int_encode(weight.float(), bits, torch.bfloat16)
    assert_bits(scale, stored)
    assert_bits(packed, int_compress(weight.float(), stored, bits)["weight_packed"])


@pytest.mark.parametrize("bits", INT_PRESETS)
@pytest.mark.parametrize("kind", ["normal", "zero", "outlier", "int_ties"])
def test_int_scale_of_a_float16_weight_and_codes_of_the_same_weight_widened(kind, bits):
    weight = fill(kind, (33, 1024)).half()
    weight[3] *= 0
    weight[4] = torch.where(weight[4] > 0, 2.0**-24, 0)  # its scale is zero in float16
    stored = int_scale(weight, bits)
    packed, scale = OPS.int_encode(weight.float(), bits, torch.float16)
    assert_bits(scale, stored)
    assert_bits(packed, int_compress(weight.float(), stored, bits)["weight_packed"])


@pytest.mark.parametrize(("kind", "shape"), cases(1))
def test_fp8_weight(kind, shape):
    weight, args = fill(kind, shape), scheme("FP8_DYNAMIC").weights
    low, high = weight.amin(-1, keepdim=True), weight.amax(-1, keepdim=True)
    scale, _ = calculate_qparams(low, high, args)
    state = {"weight": weight, "weight_scale": scale}
    expected = FloatQuantizationCompressor.compress(state, scheme("FP8_DYNAMIC"))
    codes, found_scale = OPS.fp8_encode(weight, torch.float32)
    assert_bits(found_scale, expected["weight_scale"])
    assert_bits(codes, expected["weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "bf16", "outlier", "zero", "e4m3_ties"])
def test_fp8_codes_are_chosen_under_the_stored_scale(kind, dtype):
    weight = fill(kind, (33, 1024))
    codes, scale = OPS.fp8_encode(weight, dtype)
    full = calculate_qparams(
        weight.amin(-1, keepdim=True),
        weight.amax(-1, keepdim=True),
        scheme("FP8_DYNAMIC").weights,
    )[0]
    assert_bits(scale, full.to(dtype))
    state = {"weight": weight, "weight_scale": scale.float()}
    expected = FloatQuantizationCompressor.compress(state, scheme("FP8_DYNAMIC"))
    assert_bits(codes, expected["weight"])


def test_fp8_scale_that_vanishes_in_float16_is_kept_positive():
    weight = torch.tensor([[1e-7, -5e-6, 3e-6, 0.0]])
    codes, scale = OPS.fp8_encode(weight, torch.float16)
    assert scale.item() > 0
    decoded = OPS.fp8_decode(codes, scale)
    assert (decoded - weight).abs().max() < 0.1 * weight.abs().max()


@pytest.mark.parametrize(("kind", "shape"), cases(16))
def test_nvfp4_activation(kind, shape):
    x, args = fill(kind, shape), scheme("NVFP4").input_activations
    global_scale = nvfp4_global(x)
    scale, zero = compute_dynamic_scales_and_zp(x, args, None, global_scale=global_scale)
    expected = fake_quantize(x, scale, zero, args, global_scale=global_scale)
    assert_bits(OPS.nvfp4_quantize_activation(x, global_scale.item()), expected)


@pytest.mark.parametrize("factor", [0.01, 0.5, 1000.0])
def test_nvfp4_activation_beyond_its_calibration(factor):
    x, args = fill("heavy_tail", (9, 96)), scheme("NVFP4").input_activations
    global_scale = nvfp4_global(x * factor)
    scale, zero = compute_dynamic_scales_and_zp(x, args, None, global_scale=global_scale)
    expected = fake_quantize(x, scale, zero, args, global_scale=global_scale)
    assert_bits(OPS.nvfp4_quantize_activation(x, global_scale.item()), expected)


@pytest.mark.parametrize(("kind", "shape"), cases(32))
def test_mxfp8_activation(kind, shape):
    x, args = fill(kind, shape), scheme("MXFP8").input_activations
    scale, zero = compute_dynamic_scales_and_zp(x, args, None)
    assert_bits(OPS.mxfp8_quantize_activation(x), fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize(("kind", "shape"), cases(32))
def test_mxfp4_activation(kind, shape):
    x, args = fill(kind, shape), scheme("MXFP4").input_activations
    scale, zero = compute_dynamic_scales_and_zp(x, args, None)
    assert_bits(OPS.mxfp4_quantize_activation(x), fake_quantize(x, scale, zero, args))


@pytest.mark.parametrize(("kind", "shape"), cases(1))
def test_fp8_activation(kind, shape):
    # compressed-tensors takes one scale per token only for three dimensions.
    x, args = fill(kind, shape).unsqueeze(0), scheme("FP8_DYNAMIC").input_activations
    scale, zero = compute_dynamic_scales_and_zp(x, args, None)
    assert_bits(OPS.fp8_quantize_activation(x), fake_quantize(x, scale, zero, args))


def test_activations_of_any_rank_agree_with_their_rows():
    x = fill("normal", (12, 64))
    for op in (
        lambda t: OPS.nvfp4_quantize_activation(t, 700.0),
        OPS.mxfp8_quantize_activation,
        OPS.mxfp4_quantize_activation,
        OPS.fp8_quantize_activation,
    ):
        assert_bits(op(x.view(3, 4, 64)).view(12, 64), op(x))
        assert_bits(op(x.t().contiguous().t()), op(x))
        assert_bits(op(x[5]), op(x)[5])


# compressed-tensors decodes in bfloat16 where the stored tensors are: its result is ours, rounded once.


@pytest.mark.parametrize("kind", ["normal", "bf16", "outlier", "ties", "negative_zero"])
def test_nvfp4_decode(kind):
    weight = fill(kind, (33, 1024))
    global_scale = nvfp4_global(weight)
    packed, scale = OPS.nvfp4_encode(weight, global_scale.item())
    found = OPS.nvfp4_decode(packed, scale, global_scale.item())
    state = {"weight_packed": packed, "weight_scale": scale, "weight_global_scale": global_scale}
    expected = NVFP4PackedCompressor.decompress(state, scheme("NVFP4"))["weight"]
    assert_bits(found.to(expected.dtype), expected)


@pytest.mark.parametrize("kind", ["normal", "bf16", "spread", "e4m3_ties", "negative_zero"])
def test_mxfp8_decode(kind):
    codes, scale = OPS.mxfp8_encode(fill(kind, (33, 1024)))
    found = OPS.mxfp8_decode(codes, scale)
    expected = MXFP8QuantizationCompressor.decompress(
        {"weight": codes, "weight_scale": scale}, scheme("MXFP8")
    )["weight"]
    assert_bits(found.to(expected.dtype), expected)


@pytest.mark.parametrize("kind", ["normal", "bf16", "spread", "ties", "negative_zero"])
def test_mxfp4_decode(kind):
    packed, scale = OPS.mxfp4_encode(fill(kind, (33, 1024)))
    state = {"weight_packed": packed, "weight_scale": scale}
    expected = MXFP4PackedCompressor.decompress(state, scheme("MXFP4"))["weight"]
    assert_bits(OPS.mxfp4_decode(packed, scale).to(expected.dtype), expected)


@pytest.mark.parametrize("bits", INT_PRESETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["normal", "zero", "outlier", "int_ties", "negative_zero"])
def test_int_decode(kind, dtype, bits):
    weight = fill(kind, (33, 1024))
    packed, scale = OPS.int_encode(weight, bits, dtype)
    state = {"weight_packed": packed, "weight_scale": scale, "weight_shape": torch.tensor(weight.shape)}
    expected = PackedQuantizationCompressor.decompress(state, scheme(INT_PRESETS[bits]))["weight"]
    assert_bits(OPS.int_decode(packed, scale, bits).to(expected.dtype), expected)


@pytest.mark.parametrize("kind", ["normal", "bf16", "outlier", "e4m3_ties", "negative_zero"])
def test_fp8_decode(kind):
    codes, scale = OPS.fp8_encode(fill(kind, (33, 1024)), torch.float32)
    expected = FloatQuantizationCompressor.decompress(
        {"weight": codes, "weight_scale": scale}, scheme("FP8_DYNAMIC")
    )["weight"]
    assert_bits(OPS.fp8_decode(codes, scale), expected)


def test_every_code_decodes_as_torch_does():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(8, 32)
    found = OPS.fp8_decode(codes, torch.ones(8, 1))
    expected = codes.float()
    finite = expected.isfinite()
    assert_bits(found[finite], expected[finite])
    assert found[~finite].isnan().all()
    bytes_ = torch.arange(255, dtype=torch.uint8).view(1, 255)
    ones = torch.full((1, 255 * 32), 1.0).to(torch.float8_e4m3fn)
    powers = OPS.mxfp8_decode(ones, bytes_).view(255, 32)[:, 0]
    assert_bits(powers, torch.exp2(torch.arange(-127, 128).double()).float())


# Worked by hand from the rules in docs/formats.md.


def test_vectors_of_mxfp4():
    weight = torch.zeros(4, 32)
    weight[0, :3] = torch.tensor([6.0, -6.0, 0.5])
    weight[1, 0] = 7.0
    weight[2, 0] = 6.9
    packed, scale = OPS.mxfp4_encode(weight)
    assert scale.flatten().tolist() == [127, 128, 127, 0]
    assert packed[:, :2].tolist() == [[0xF7, 0x01], [0x06, 0], [0x07, 0], [0, 0]]
    assert OPS.mxfp4_decode(packed, scale)[:, 0].tolist() == [6.0, 8.0, 6.0, 0.0]


def test_vectors_of_packed_integers():
    weight = torch.zeros(1, 128)
    weight[0, :10] = torch.tensor([-7.5, -7, -6, -5, -4, -3, -2, -1, 7.5, -7.5])
    packed, scale = OPS.int_encode(weight, 4, torch.bfloat16)
    assert scale.item() == 1.0
    assert packed[0, :2].tolist() == [0x76543210, 0x8888880F - 2**32]
    weight[0, :4] = torch.tensor([-127.5, -127, -126, -125])
    packed, scale = OPS.int_encode(weight, 8, torch.bfloat16)
    assert scale.item() == 1.0
    assert packed[0, 0].item() == 0x03020100


ENCODERS = {
    "nvfp4": lambda x: OPS.nvfp4_encode(x, 1.0),
    "mxfp8": OPS.mxfp8_encode,
    "mxfp4": OPS.mxfp4_encode,
    "int4": lambda x: OPS.int_encode(x, 4, torch.float32),
    "int8": lambda x: OPS.int_encode(x, 8, torch.float32),
}


@pytest.mark.parametrize("op", ENCODERS)
def test_columns_that_are_no_whole_groups_are_refused(op):
    with pytest.raises(RuntimeError, match="multiple of the group size"):
        ENCODERS[op](torch.ones(2, 40))


def test_other_widths_of_integers_are_refused():
    with pytest.raises(RuntimeError, match="bits is 5, expected 4 or 8"):
        OPS.int_encode(torch.ones(2, 128), 5, torch.float32)
    packed, scale = OPS.int_encode(torch.ones(2, 128), 4, torch.float32)
    with pytest.raises(RuntimeError, match="scale has shape"):
        OPS.int_decode(torch.cat([packed, packed], 1), scale, 4)
    with pytest.raises(RuntimeError, match="expected rows of int32"):
        OPS.int_decode(packed.view(torch.uint8), scale, 4)


def test_other_dtypes_are_refused():
    with pytest.raises(RuntimeError, match="expected float32"):
        OPS.fp8_encode(torch.ones(2, 32, dtype=torch.bfloat16), torch.bfloat16)


def test_results_do_not_depend_on_the_number_of_threads():
    weight = fill("heavy_tail", (257, 512))
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append([tensor for encode in ENCODERS.values() for tensor in encode(weight)])
    torch.set_num_threads(threads)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert_bits(found, expected)
