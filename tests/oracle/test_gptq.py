"""gptq_block against a numpy reference that does the same float32 operations in the same order: every bit must agree."""

import os

import numpy as np
import pytest
import torch

torch.ops.load_library(os.environ["PRISMAQUANT_OPS"])
OPS = torch.ops.prismaquant

E2M1_GROUP16, E4M3_GROUP32, E4M3_ROW = 0, 1, 2
GRIDS = [E2M1_GROUP16, E4M3_GROUP32, E4M3_ROW]
GROUP = {E2M1_GROUP16: 16, E4M3_GROUP32: 32}
OUT, COLUMNS = 29, 96

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double().numpy()


def nearest(grid: np.ndarray, sign_bit: int, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Nearest grid value and its code, ties to the even code."""
    middles = (grid[1:] + grid[:-1]) / 2
    magnitude = np.abs(x.astype(np.float64))
    index = np.searchsorted(middles, magnitude)
    tie = (index < len(middles)) & (middles[np.minimum(index, len(middles) - 1)] == magnitude)
    index += tie & (index % 2 == 1)
    sign = np.signbit(x)
    value = np.where(sign, -grid[index], grid[index]).astype(np.float32)
    return value, (index | sign * sign_bit).astype(np.uint8)


def to_e4m3(x: np.ndarray) -> np.ndarray:
    return nearest(E4M3, 0x80, x)[1].astype(int)


def quantize(grid: int, w: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    quotient = w / scale
    if grid == E2M1_GROUP16:
        value, code = nearest(E2M1, 8, quotient + np.float32(0))
    else:
        value, code = nearest(E4M3, 0x80, quotient)
    return value * scale, code


def rolled_error(grid, w, scale, u):
    """What rounding the group column by column under the scale would leave, one group per row."""
    w = w.copy()
    total = np.zeros(len(w), np.float32)
    for j in range(w.shape[1]):
        spread = (w[:, j] - quantize(grid, w[:, j], scale)[0]) / u[j, j]
        total = total + spread * spread
        w[:, j + 1 :] -= spread[:, None] * u[j, j + 1 :]
    return total


def decode_scale(grid: int, code: np.ndarray, global_scale: np.float32) -> np.ndarray:
    if grid == E2M1_GROUP16:
        return E4M3[code].astype(np.float32) / global_scale
    return np.exp2(code.astype(np.float64) - 127).astype(np.float32)


def rule_and_candidates(grid: int, w: np.ndarray, global_scale: np.float32):
    """The codec's scale codes, the preferred ones of equals, and the lowest and highest code searched, per row."""
    largest = np.abs(w).max(axis=1)
    if grid == E2M1_GROUP16:
        ideal = global_scale * (largest / np.float32(6))
        rule = to_e4m3(ideal)
        rule = np.where(rule == 0, to_e4m3(np.float32([0.125])), rule)
        low = np.maximum(1, to_e4m3(ideal * np.float32(0.5)))
        high = np.minimum(low + 15, 0x7E)
        preferred = np.clip(rule, low, high)
        fixed = largest == 0
    else:
        # The mantissa is below 1.75, or the scale is the next one.
        fraction, exponent = np.frexp(largest.astype(np.float64))
        rule = np.where(largest > 0, np.maximum(exponent - 1 + (fraction >= 0.875) + 127 - 8, 0), 0)
        low, high, preferred = rule - 1, rule + 1, rule
        fixed = rule <= 1
    return rule, np.where(fixed, rule, preferred), np.where(fixed, rule, low), np.where(fixed, rule, high)


def choose(grid, w, u, global_scale, search):
    rule, preferred, low, high = rule_and_candidates(grid, w, global_scale)
    if not search:
        return rule
    best, least = preferred, rolled_error(grid, w, decode_scale(grid, preferred, global_scale), u)
    for step in range((high - low).max() + 1):
        code = np.minimum(low + step, high)
        error = rolled_error(grid, w, decode_scale(grid, code, global_scale), u)
        better = error < least
        best, least = np.where(better, code, best), np.where(better, error, least)
    return best


def reference(grid, weight, u, row_scale, global_scale, search):
    """(weight, scale, codes, error) as the operator leaves them."""
    w, u = weight.numpy().copy(), u.numpy()
    columns, group = w.shape[1], GROUP.get(grid, w.shape[1])
    codes, error = np.zeros(w.shape, np.uint8), np.zeros_like(w)
    scales = np.zeros((len(w), columns // group), np.uint8)
    scale = None if row_scale is None else row_scale.numpy()[:, 0]
    with np.errstate(all="ignore"):
        for j in range(columns):
            if j % group == 0 and grid != E4M3_ROW:
                members = slice(j, j + group)
                code = choose(grid, w[:, members], u[members, members], global_scale, search)
                scales[:, j // group] = code
                scale = decode_scale(grid, code, global_scale)
            quantized, codes[:, j] = quantize(grid, w[:, j], scale)
            error[:, j] = (w[:, j] - quantized) / u[j, j]
            w[:, j] = quantized
            w[:, j + 1 :] -= error[:, j, None] * u[j, j + 1 :]
    return w, row_scale.numpy() if grid == E4M3_ROW else scales, codes, error


def run(grid, weight, u, row_scale, global_scale, search):
    w = weight.clone()
    codes = torch.full(w.shape, 0xAA, dtype=torch.uint8)
    error = torch.full(w.shape, torch.nan)
    if grid == E4M3_ROW:
        scale = row_scale.clone()
    else:
        scale = torch.full((len(w), w.shape[1] // GROUP[grid]), 0xAA, dtype=torch.uint8)
    OPS.gptq_block(grid, w, u, scale, codes, error, float(global_scale), search)
    return w, scale, codes, error


def factor(kind: str, columns: int = COLUMNS) -> torch.Tensor:
    """The upper Cholesky factor of the inverse of a damped Hessian, float32."""
    generator = torch.Generator().manual_seed(columns)
    x = torch.randn(512, columns, generator=generator, dtype=torch.float64)
    x = x + 2 * x[:, :1] + torch.roll(x, 1, dims=1)
    if kind == "diagonal":
        x = torch.diag(torch.rand(columns, generator=generator, dtype=torch.float64) + 0.5)
    if kind == "near_singular":
        x = x[:3]
    if kind == "dead_columns":
        x[:, ::5] = 0
    h = x.T @ x / len(x)
    damping = {"near_singular": 1e-6, "diagonal": 0.0}.get(kind, 0.1)
    h.diagonal().add_(damping * h.diagonal().mean())
    return torch.linalg.cholesky(torch.linalg.inv(h), upper=True).float().contiguous()


def weights(kind: str, columns: int = COLUMNS) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind) * 100 + columns)
    w = torch.randn(OUT, columns, generator=generator) * 0.02
    if kind == "heavy_tail":
        return w / torch.rand(w.shape, generator=generator).clamp_min(1e-4)
    if kind == "zero_rows":
        w[::3] = 0
    if kind == "negative_zero_groups":
        w[:, 32:64] = -0.0
    if kind == "outlier":
        w[4, 37] = -1e4
    if kind == "subnormal":
        return w * 1e-38
    if kind == "huge":
        return w * 1e33
    if kind == "group_spread":
        power = torch.randint(-60, 60, (OUT, columns // 16, 1), generator=generator)
        return (w.view(OUT, -1, 16) * torch.exp2(power.float())).view(OUT, columns)
    if kind == "ties":
        choice = torch.randint(0, 7, w.shape, generator=generator)
        w = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])[choice] * torch.sign(w)
        w[:, ::16] = 6
    return w


WEIGHTS = [
    "normal",
    "heavy_tail",
    "zero_rows",
    "negative_zero_groups",
    "outlier",
    "subnormal",
    "huge",
    "group_spread",
    "ties",
]
FACTORS = ["correlated", "diagonal", "near_singular", "dead_columns"]


def scales_for(grid: int, weight: torch.Tensor) -> tuple[torch.Tensor | None, np.float32]:
    """The per-row scale of FP8, the global scale of NVFP4."""
    if grid == E4M3_ROW:
        return OPS.fp8_encode(weight, torch.float32)[1], np.float32(1)
    if grid == E4M3_GROUP32:
        return None, np.float32(1)
    with np.errstate(over="ignore"):
        scale = np.float32(2688) / np.float32(weight.abs().max().item())
    return None, scale if np.isfinite(scale) else np.float32(1)


def assert_bits(found: torch.Tensor, expected: np.ndarray) -> None:
    assert found.shape == expected.shape
    assert found.numpy().dtype == expected.dtype
    unlike = found.numpy().view(np.uint8) != np.ascontiguousarray(expected).view(np.uint8)
    assert not unlike.any(), f"{np.argwhere(unlike)[:5]} of {found.shape}"


def decode(grid: int, scale: torch.Tensor, codes: torch.Tensor, global_scale: np.float32):
    if grid == E2M1_GROUP16:
        packed = codes[:, ::2] | codes[:, 1::2] << 4
        return OPS.nvfp4_decode(packed, scale.view(torch.float8_e4m3fn), float(global_scale))
    if grid == E4M3_GROUP32:
        return OPS.mxfp8_decode(codes.view(torch.float8_e4m3fn), scale)
    return OPS.fp8_decode(codes.view(torch.float8_e4m3fn), scale)


def assert_decodable(grid: int, scale: torch.Tensor, codes: torch.Tensor) -> None:
    if grid == E2M1_GROUP16:
        assert codes.max() < 16
        assert scale.max() < 0x7F
        assert scale.min() > 0
    else:
        assert not ((codes & 0x7F) == 0x7F).any()
    if grid == E4M3_GROUP32:
        assert scale.max() < 255


@pytest.mark.parametrize("search", [False, True])
@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("hessian", FACTORS)
@pytest.mark.parametrize("kind", WEIGHTS)
def test_bits_of_the_reference(kind, hessian, grid, search):
    weight, u = weights(kind), factor(hessian)
    row_scale, global_scale = scales_for(grid, weight)
    arguments = (grid, weight, u, row_scale, global_scale, search)
    found = run(*arguments)
    for tensor, expected in zip(found, reference(*arguments), strict=True):
        assert_bits(tensor, expected)
    w, scale, codes, error = found
    assert error.isfinite().all()
    assert_decodable(grid, scale, codes)
    assert_bits(decode(grid, scale, codes, global_scale), w.numpy())


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("columns", [32, 64, 128])
def test_other_widths(grid, columns):
    weight, u = weights("normal", columns), factor("correlated", columns)
    arguments = (grid, weight, u, *scales_for(grid, weight), True)
    for tensor, expected in zip(run(*arguments), reference(*arguments), strict=True):
        assert_bits(tensor, expected)


@pytest.mark.parametrize("grid", [E2M1_GROUP16, E4M3_GROUP32])
@pytest.mark.parametrize("kind", ["normal", "heavy_tail", "group_spread"])
def test_the_chosen_scale_is_the_best_of_those_searched(kind, grid):
    """Of the first group, which nothing has compensated yet, in float64."""
    weight, u = weights(kind), factor("correlated")
    _, global_scale = scales_for(grid, weight)
    group = GROUP[grid]
    scale = run(grid, weight, u, None, global_scale, True)[1][:, 0].numpy().astype(int)
    w = weight.double().numpy()[:, :group]
    inner = u.double().numpy()[:group, :group]

    def error(row: int, code: int) -> float:
        step = E4M3[code] / float(global_scale) if grid == E2M1_GROUP16 else 2.0 ** (code - 127)
        remaining, total = w[row].copy(), 0.0
        for j in range(group):
            value, _ = nearest(E2M1 if grid == E2M1_GROUP16 else E4M3, 0x80, remaining[j] / step)
            spread = (remaining[j] - value * step) / inner[j, j]
            total += spread**2
            remaining[j + 1 :] -= spread * inner[j, j + 1 :]
        return total

    rule, _, low, high = rule_and_candidates(grid, w.astype(np.float32), global_scale)
    gained = 0
    for row in range(OUT):
        errors = [error(row, code) for code in range(low[row], high[row] + 1)]
        assert low[row] <= scale[row] <= high[row] or scale[row] == rule[row]
        assert error(row, scale[row]) <= min(errors) * (1 + 1e-4)
        gained += error(row, scale[row]) < error(row, rule[row]) * 0.999
    if grid == E2M1_GROUP16:
        assert gained > (OUT / 2 if kind == "normal" else 0)


@pytest.mark.parametrize(
    ("grid", "search"), [(E2M1_GROUP16, False), (E2M1_GROUP16, True), (E4M3_GROUP32, False), (E4M3_ROW, True)]
)
def test_a_diagonal_hessian_without_search_gives_the_codecs_codes(grid, search):
    weight = weights("group_spread")
    if grid == E2M1_GROUP16:
        weight[:, 3] = -0.0
    u = torch.diag(torch.rand(COLUMNS) + 0.1)
    row_scale, global_scale = scales_for(grid, weight)
    _, scale, codes, _ = run(grid, weight, u, row_scale, global_scale, search)
    if grid == E2M1_GROUP16:
        expected, expected_scale = OPS.nvfp4_encode(weight, float(global_scale))
        found = codes[:, ::2] | codes[:, 1::2] << 4
    else:
        encode = OPS.mxfp8_encode if grid == E4M3_GROUP32 else lambda w: OPS.fp8_encode(w, torch.float32)
        expected, expected_scale = encode(weight)
        found = codes
    same = torch.equal(found, expected.view(torch.uint8)) and torch.equal(
        scale.view(torch.uint8), expected_scale.view(torch.uint8)
    )
    assert same == (not search or grid == E4M3_ROW)


def test_a_microscaling_scale_one_step_down_is_taken_where_it_is_better():
    """224 is both 224 under the codec's scale and 448 under half of it, where small values lose less."""
    weight = torch.full((1, 32), 0.0012)
    weight[0, 0] = 224
    scale = run(E4M3_GROUP32, weight, torch.eye(32), None, 1, True)[1]
    assert OPS.mxfp8_encode(weight)[1].item() == 127
    assert scale.item() == 126


def test_error_carries_what_the_columns_to_the_right_need():
    """Two blocks with the product between them are one block, up to the product's rounding."""
    weight, u = weights("normal", 128).double(), factor("correlated", 128)
    whole = run(E4M3_GROUP32, weight.float(), u, None, 1, False)
    left = run(E4M3_GROUP32, weight[:, :64].float().contiguous(), u[:64, :64].contiguous(), None, 1, False)
    rest = weight[:, 64:] - left[3].double() @ u[:64, 64:].double()
    right = run(E4M3_GROUP32, rest.float(), u[64:, 64:].contiguous(), None, 1, False)
    assert torch.equal(left[2], whole[2][:, :64])
    assert (right[2] != whole[2][:, 64:]).float().mean() < 0.01


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf"), 3e38])
def test_no_input_gives_codes_that_readers_cannot_decode(grid, poison):
    weight, u = weights("normal"), factor("near_singular")
    row_scale, global_scale = scales_for(grid, weight)
    weight[:, 5] = poison
    for search in (False, True):
        _, scale, codes, _ = run(grid, weight, u, row_scale, global_scale, search)
        assert_decodable(grid, scale, codes)


@pytest.mark.parametrize("grid", GRIDS)
def test_results_do_not_depend_on_the_number_of_threads(grid):
    weight, u = weights("heavy_tail"), factor("correlated")
    row_scale, global_scale = scales_for(grid, weight)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(grid, weight, u, row_scale, global_scale, True))
    torch.set_num_threads(threads)
    for other in results[1:]:
        for found, expected in zip(other, results[0], strict=True):
            assert_bits(found, expected.numpy())


def arguments_of(grid: int = E2M1_GROUP16, columns: int = 32) -> dict:
    shape = (2, columns)
    return {
        "grid": grid,
        "weight": torch.zeros(shape),
        "u": torch.eye(columns),
        "scale": torch.zeros(2, columns // 16, dtype=torch.uint8),
        "codes": torch.zeros(shape, dtype=torch.uint8),
        "error": torch.zeros(shape),
        "global_scale": 1.0,
        "choose_scales": True,
    }


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("grid", 6, "grid is 6"),
        ("weight", torch.zeros(32), "weight has shape"),
        ("weight", torch.zeros(2, 32, dtype=torch.float64), "weight is Double"),
        ("weight", torch.zeros(32, 2).t(), "weight must be contiguous"),
        ("u", torch.eye(31), "u is Float"),
        ("u", torch.eye(32).double(), "u is Double"),
        ("scale", torch.zeros(2, 1, dtype=torch.uint8), "scale is Byte"),
        ("scale", torch.zeros(2, 2), "scale is Float"),
        ("codes", torch.zeros(2, 16, dtype=torch.uint8), "codes is Byte"),
        ("error", torch.zeros(1, 32), "error is Float"),
        ("global_scale", 0.0, "global_scale is 0"),
        ("global_scale", float("nan"), "global_scale is nan"),
    ],
)
def test_wrong_arguments_are_refused(name, value, message):
    OPS.gptq_block(**arguments_of())
    with pytest.raises(RuntimeError, match=message):
        OPS.gptq_block(**(arguments_of() | {name: value}))


@pytest.mark.parametrize(("grid", "columns"), [(E2M1_GROUP16, 40), (E4M3_GROUP32, 48)])
def test_columns_that_are_no_whole_groups_are_refused(grid, columns):
    with pytest.raises(RuntimeError, match=f"{columns} columns are no multiple of the group size"):
        OPS.gptq_block(**arguments_of(grid, columns))
