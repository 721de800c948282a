"""The exact allocation against HiGHS on random problems, through `prismaquant allocate --costs`."""

import itertools
import json
import os
import subprocess

import highspy
import numpy as np
import pytest

PROGRAM = os.environ["PRISMAQUANT_BINARY"]
BITS = [4.5, 8.02, 8.25, 4.25, 16.0]


def model_like(random, units: int, choices: int):
    """A few sizes of Linears, losses over orders of magnitude that fall with the bits."""
    weights = random.choice([1 << 20, 3 << 19, 5 << 18, 17 << 16], size=units)
    bits = np.array(BITS[:choices])
    loss = random.lognormal(-7, 1.5, size=(units, 1)) * 4.0 ** (4.5 - bits) * random.uniform(0.5, 2, (units, choices))
    loss[:, bits == 16] = 0
    return (weights[:, None] * bits / 8).astype(np.int64) + 8, loss


def unrelated(random, units: int, choices: int):
    """Bytes and losses that have nothing to do with each other."""
    return random.integers(0, 1000, (units, choices)), random.uniform(0, 1, (units, choices))


def correlated(random, units: int, choices: int):
    """Loss nearly linear in bytes: the relaxation hardly decides anything."""
    sizes = random.integers(1, 60, (units, choices))
    return sizes, (70.0 - sizes + random.integers(0, 3, (units, choices))) / 7


def subset_sum(random, units: int, choices: int):
    """Loss and bytes of every choice add up to the same, but for a little: many allocations are nearly as good."""
    sizes = random.integers(1 << 16, 1 << 20, (units, choices))
    return sizes, ((1 << 20) - sizes + random.integers(0, 100, (units, choices))) * 1e-9


def heavy_tailed(random, units: int, choices: int):
    """Losses from 1e-9 to 10 nats, sizes from 4 kB to 400 MB."""
    weights = np.exp(random.uniform(9, 19.5, (units, 1)))
    loss = np.exp(random.uniform(-21, 2, (units, 1))) * random.uniform(0, 1, (units, choices)) ** 4
    return (weights * random.uniform(0.4, 2, (units, choices))).astype(np.int64), loss


def cases():
    random = np.random.default_rng(5)
    found = []
    for index in range(34):
        found.append(("model", model_like, int(random.integers(20, 401)), int(random.integers(2, 6)), index))
    for index in range(30):
        found.append(("unrelated", unrelated, int(random.integers(5, 401)), int(random.integers(2, 6)), index))
    for index in range(15):
        found.append(("correlated", correlated, int(random.integers(5, 41)), int(random.integers(2, 5)), index))
    for index in range(10):
        found.append(("subset_sum", subset_sum, int(random.integers(5, 21)), int(random.integers(2, 4)), index))
    for index in range(10):
        found.append(("heavy_tailed", heavy_tailed, int(random.integers(20, 401)), int(random.integers(2, 6)), index))
    found += [("model", model_like, 400, 5, 400), ("heavy_tailed", heavy_tailed, 400, 5, 400)]
    return found


def highs(sizes: np.ndarray, losses: np.ndarray, budget: int, expected: float) -> float:
    """Least loss within the budget; HiGHS's own answer is checked in integers before it is believed.

    HiGHS cuts branches by absolute tolerances near 1e-6, so the objective is scaled to some thousands.
    """
    units, choices = sizes.shape
    solver = highspy.Highs()
    solver.setOptionValue("output_flag", False)
    solver.setOptionValue("mip_rel_gap", 0.0)
    solver.setOptionValue("mip_abs_gap", 1e-12)
    solver.setOptionValue("threads", 1)
    scale = 1e4 / max(expected, 1e-9 * losses.max())
    x = [[solver.addBinary(obj=losses[u, c] * scale) for c in range(choices)] for u in range(units)]
    for row in x:
        solver.addConstr(sum(row) == 1)
    solver.addConstr(sum(int(sizes[u, c]) * x[u][c] for u in range(units) for c in range(choices)) <= int(budget))
    solver.run()
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    values = np.array(solver.getSolution().col_value).reshape(units, choices)
    picked = values.argmax(1)
    assert np.abs(values - np.eye(choices)[picked]).max() < 1e-5
    rows = np.arange(units)
    assert sizes[rows, picked].sum() <= budget
    return losses[rows, picked].sum()


def highs_smallest(sizes: np.ndarray, losses: np.ndarray, most: float) -> tuple[int, float]:
    """Fewest bytes at a loss of at most `most`, and the loss, both of HiGHS's choice summed here.

    HiGHS may pass the bound by its tolerance: then its choice is one of a slightly easier problem.
    """
    units, choices = sizes.shape
    solver = highspy.Highs()
    for option, value in [("output_flag", False), ("mip_rel_gap", 0.0), ("mip_abs_gap", 1e-9), ("threads", 1),
                          ("mip_feasibility_tolerance", 1e-9), ("primal_feasibility_tolerance", 1e-9)]:
        solver.setOptionValue(option, value)
    unit_bytes = np.gcd.reduce((sizes - sizes.min(1, keepdims=True)).ravel())
    steps = (sizes - sizes.min(1, keepdims=True)) // max(unit_bytes, 1)
    x = [[solver.addBinary(obj=float(steps[u, c])) for c in range(choices)] for u in range(units)]
    for row in x:
        solver.addConstr(sum(row) == 1)
    scale = 1e3 / most
    solver.addConstr(sum(losses[u, c] * scale * x[u][c] for u in range(units) for c in range(choices)) <= most * scale)
    solver.run()
    assert solver.getModelStatus() == highspy.HighsModelStatus.kOptimal
    picked = np.array(solver.getSolution().col_value).reshape(units, choices).argmax(1)
    rows = np.arange(units)
    return int(sizes[rows, picked].sum()), losses[rows, picked].sum()


def ours(sizes: np.ndarray, losses: np.ndarray, budget: list, folder) -> dict:
    units = [
        {"name": f"u{u}", "weights": 8, "choices": [
            {"format": f"f{c}", "bytes": int(sizes[u, c]), "cost": float(losses[u, c])} for c in range(sizes.shape[1])]}
        for u in range(sizes.shape[0])
    ]  # fmt: skip
    (folder / "costs.json").write_text(json.dumps({"schema": 1, "units": units}))
    done = subprocess.run([PROGRAM, "allocate", "--costs", folder / "costs.json", *map(str, budget), "--json", "-"],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def picked_by(found: dict, units: int) -> np.ndarray:
    return np.array([int(found["choices"][f"u{u}"][1:]) for u in range(units)])


def test_there_are_a_hundred_problems_of_up_to_400_units():
    assert len(cases()) >= 100
    assert max(units * choices for _, _, units, choices, _ in cases()) == 400 * 5


@pytest.mark.parametrize("kind, make, units, choices, seed", cases())
def test_equals_highs(kind, make, units, choices, seed, tmp_path):
    random = np.random.default_rng([seed, units, choices])
    sizes, losses = make(random, units, choices)
    smallest, largest = sizes.min(1).sum(), sizes.max(1).sum()
    budget = int(smallest + random.uniform(0.02, 0.9) * (largest - smallest))
    found = ours(sizes, losses, ["--bytes", budget], tmp_path)
    picked = picked_by(found, units)
    rows = np.arange(units)
    assert found["bytes"] == sizes[rows, picked].sum() <= budget
    assert found["slack_bytes"] == budget - found["bytes"]
    assert found["predicted_kl"] == pytest.approx(losses[rows, picked].sum(), rel=1e-12)
    assert found["gap"] == 0 and found["lower_bound"] == found["predicted_kl"]
    best = highs(sizes, losses, budget, found["predicted_kl"])
    assert found["predicted_kl"] == pytest.approx(best, rel=1e-9)


def expect_smallest(found: dict, sizes: np.ndarray, losses: np.ndarray, most: float):
    rows, picked = np.arange(len(sizes)), picked_by(found, len(sizes))
    assert found["bytes"] == sizes[rows, picked].sum() == found["bytes_lower_bound"]
    assert found["predicted_kl"] == pytest.approx(losses[rows, picked].sum(), rel=1e-12)
    assert found["predicted_kl"] <= most and found["gap"] == 0 and found["slack_bytes"] == 0
    assert found["budget"] == {"max_kl": most}


@pytest.mark.parametrize("seed", range(40))
def test_the_smallest_for_a_loss_equals_brute_force(seed, tmp_path):
    random = np.random.default_rng([seed, 1])
    make = [model_like, unrelated, correlated, subset_sum, heavy_tailed][seed % 5]
    units, choices = int(random.integers(1, 8)), int(random.integers(2, 5))
    sizes, losses = make(random, units, choices)
    every = np.array(list(itertools.product(range(choices), repeat=units)))
    rows = np.arange(units)
    all_bytes, all_losses = sizes[rows, every].sum(1), losses[rows, every].sum(1)
    most = float(random.choice(all_losses) * random.uniform(1, 1.2)) + 1e-12
    found = ours(sizes, losses, ["--max-kl", most], tmp_path)
    expect_smallest(found, sizes, losses, most)
    assert found["bytes"] == all_bytes[all_losses <= most].min()


@pytest.mark.parametrize("kind, make, units, choices, seed",
                         [case for case in cases() if case[1] in (model_like, unrelated, correlated) and case[2] <= 150][::2])
def test_the_smallest_for_a_loss_equals_highs(kind, make, units, choices, seed, tmp_path):
    random = np.random.default_rng([seed, units, choices, 2])
    sizes, losses = make(random, units, choices)
    least, largest = losses.min(1).sum(), losses.max(1).sum()
    most = float(least + random.uniform(0.02, 0.5) * (largest - least))
    found = ours(sizes, losses, ["--max-kl", most], tmp_path)
    expect_smallest(found, sizes, losses, most)
    fewest, loss = highs_smallest(sizes, losses, most)
    assert loss <= most * (1 + 1e-8)
    if loss <= most:
        assert found["bytes"] == fewest
    else:
        assert found["bytes"] >= fewest


def test_an_unreachable_loss_names_the_least(tmp_path):
    sizes, losses = np.array([[3, 5], [4, 9]]), np.array([[1.0, 0.125], [1.0, 0.5]])
    units = [{"name": f"u{u}", "choices": [{"format": f"f{c}", "bytes": int(sizes[u, c]), "cost": losses[u, c]}
                                           for c in (0, 1)]} for u in (0, 1)]  # fmt: skip
    (tmp_path / "costs.json").write_text(json.dumps({"schema": 1, "units": units}))
    run = [PROGRAM, "allocate", "--costs", tmp_path / "costs.json", "--json", "-"]
    done = subprocess.run([*run, "--max-kl", "0.6"], capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert "--max-kl 0.6" in done.stderr and "0.625 nats" in done.stderr and done.stderr.count("\n") == 1
    assert json.loads(subprocess.run([*run, "--max-kl", "0.625"], capture_output=True, text=True).stdout)["bytes"] == 14
    for budget in ([], ["--bytes", "9", "--max-kl", "1"]):
        done = subprocess.run([*run, *budget], capture_output=True, text=True)
        assert done.returncode == 2 and "--max-kl" in done.stderr


def test_infeasible_budget(tmp_path):
    sizes, losses = np.array([[3, 5], [4, 9]]), np.array([[1.0, 0], [1.0, 0]])
    (tmp_path / "costs.json").write_text(json.dumps({"schema": 1, "units": [
        {"name": f"u{u}", "choices": [{"format": f"f{c}", "bytes": int(sizes[u, c]), "cost": losses[u, c]} for c in (0, 1)]}
        for u in (0, 1)]}))  # fmt: skip
    done = subprocess.run([PROGRAM, "allocate", "--costs", tmp_path / "costs.json", "--bytes", "6", "--json", "-"],
                          capture_output=True, text=True)
    assert done.returncode == 1 and not done.stdout
    assert "7 bytes" in done.stderr and done.stderr.count("\n") == 1
