"""Budgets of a probed run: device memory against the configuration's arithmetic, KL bounds against the other budgets."""
import json
import os
import pathlib
import subprocess

import pytest

ROOT = pathlib.Path(os.environ["PRISMAQUANT_SOURCE_DIR"])
PROGRAM = os.environ["PRISMAQUANT_BINARY"]
SOURCE = ROOT / "examples" / "tiny-qwen3_5"
COMMON = ["--calibration", SOURCE / "calibration.txt", "--samples", "4", "--tokens", "64", "--precision", "float32"]


def run(*args, expect=0):
    done = subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True)
    assert done.returncode == expect, f"exit {done.returncode}: {done.stderr[-2000:]}"
    return done


def refused(*args, code):
    """The one line of an error; CLI11 adds a hint on --help to its own."""
    done = run(*args, expect=code)
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("Run with --help")]
    assert len(lines) == 1 and not done.stdout, done.stderr
    return lines[0]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    folder = tmp_path_factory.mktemp("budgets") / "work"
    run("probe", SOURCE, "--work", folder, *COMMON)
    return folder


@pytest.fixture(scope="module")
def plan(work):
    return lambda *budget: json.loads(run("allocate", "--work", work, *budget, "--json", "-").stdout)


def caches(context, sequences=1, drafts=0):
    text = json.loads((SOURCE / "config.json").read_text())["text_config"]
    full = text["layer_types"].count("full_attention") + (text["mtp_num_hidden_layers"] if drafts else 0)
    linear = text["layer_types"].count("linear_attention")
    keys = text["linear_num_key_heads"] * text["linear_key_head_dim"]
    values = text["linear_num_value_heads"] * text["linear_value_head_dim"]
    convolution = (text["linear_conv_kernel_dim"] - 1 + drafts) * (2 * keys + values) * 2
    recurrence = values * text["linear_key_head_dim"] * 4
    kv = full * 2 * text["num_key_value_heads"] * text["head_dim"] * 2 * context * sequences
    return kv, linear * sequences * (2 + drafts) * (convolution + recurrence)


@pytest.mark.parametrize("context, sequences, drafts", [(1, 1, 0), (4096, 1, 0), (4096, 3, 2)])
def test_weights_and_caches_fit_the_device(plan, context, sequences, drafts):
    kv, state = caches(context, sequences, drafts)
    size = 5_600_000
    load = ["--context", context, "--sequences", sequences, "--drafts", drafts]
    found = plan("--device-memory", size + kv + state, *load)
    device = found["device"]
    assert (device["kv_cache_bytes"], device["state_bytes"]) == (kv, state)
    assert device["weights_bytes"] == found["file_bytes"] <= size
    assert device["free_bytes"] == size - found["file_bytes"] >= 0
    assert found["budget"] == {"device_bytes": size + kv + state, "context": context, "sequences": sequences,
                               "drafts": drafts}
    assert found["choices"] == plan("--size", size)["choices"]


def test_the_parts_are_printed(work):
    text = run("allocate", "--work", work, "--device-memory", "12MB", "--context", "4096").stdout
    kv, state = caches(4096)
    assert "device memory 12.000 MB: weights" in text
    assert f"KV cache {kv / 1e6:.3f} MB, state {state / 1e6:.3f} MB, free" in text


def test_a_device_too_small_is_told_the_smallest(work, plan):
    line = refused("allocate", "--work", work, "--device-memory", "1MB", "--context", "4096", code=1)
    kv, state = caches(4096)
    assert f"{kv} of KV cache and {state} of state" in line
    smallest = int(line.split("the smallest feasible is ")[1].split()[0])
    assert plan("--device-memory", smallest, "--context", "4096")["device"]["free_bytes"] >= 0
    refused("allocate", "--work", work, "--device-memory", smallest - 1, "--context", "4096", code=1)


def test_max_kl_is_the_inverse_of_size(plan):
    for size in (5_000_000, 6_000_000, 8_000_000):
        by_size = plan("--size", size)
        found = plan("--max-kl", by_size["objective"])
        assert found["objective"] <= by_size["objective"]
        assert found["predicted_kl"] <= by_size["objective"]
        assert found["bytes"] == found["bytes_lower_bound"] <= by_size["bytes"]
        below = plan("--size", found["file_bytes"] - 8)
        assert below["objective"] > by_size["objective"]


def test_max_kl_without_weights_bounds_the_text_alone(plan):
    most = plan("--bpp", "6")["predicted_kl"]
    weights = ["--caption-weight", "0", "--mtp-weight", "0"]
    alone, whole = plan("--max-kl", most, *weights), plan("--max-kl", most)
    assert alone["predicted_kl"] == alone["objective"] <= most
    assert all(choice == "nvfp4" for name, choice in alone["choices"].items() if name.startswith("mtp."))
    assert alone["bytes"] <= whole["bytes"] and whole["predicted_kl"] <= whole["objective"] <= most


def test_an_unreachable_kl_is_told_the_least(work, plan):
    options = ["--formats", "nvfp4,fp8"]
    line = refused("allocate", "--work", work, "--max-kl", "1e-9", *options, code=1)
    least = line.split("the least predicted KL is ")[1].split()[0]
    assert plan("--max-kl", least, *options)["objective"] == float(least)


def test_one_budget_at_a_time(work):
    budgets = [["--bpp", "5"], ["--size", "5MB"], ["--device-memory", "9MB", "--context", "64"], ["--max-kl", "1"],
               ["--knee"]]
    for i, first in enumerate(budgets):
        for second in budgets[:i]:
            line = refused("allocate", "--work", work, *first, *second, code=2)
            assert first[0] in line and second[0] in line
    assert "--context" in refused("allocate", "--work", work, "--device-memory", "9MB", code=2)
    assert "--device-memory" in refused("allocate", "--work", work, "--context", "64", code=2)
    for value in ("0", "-1", "nan", "some"):
        assert "--max-kl" in refused("allocate", "--work", work, "--max-kl", value, code=2)


def test_scores_are_no_kl(tmp_path):
    line = refused("quantize", SOURCE, tmp_path / "out", *COMMON, "--labels", "data", "--max-kl", "0.1", code=2)
    assert "--max-kl 0.1" in line and "--labels data" in line and "--labels sampled" in line
    assert not (tmp_path / "out").exists()


def test_drafts_need_an_mtp_head(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for path in SOURCE.iterdir():
        if path.is_file():
            (source / path.name).write_bytes(path.read_bytes())
    config = json.loads((source / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 0
    (source / "config.json").write_text(json.dumps(config))
    line = refused("quantize", source, tmp_path / "out", *COMMON, "--device-memory", "9MB", "--context", "64",
                   "--drafts", "2", code=2)
    assert "--drafts 2" in line and "MTP head" in line


def test_the_card_names_the_budget(tmp_path):
    out = tmp_path / "out"
    run("quantize", SOURCE, out, *COMMON, "--device-memory", "9MB", "--context", "512", "--drafts", "1", "--no-eval",
        "--render", "rtn")
    card = (out / "README.md").read_text()
    assert "--device-memory 9MB --context 512 --sequences 1 --drafts 1" in card
    record = json.loads((out / "prismaquant.json").read_text())
    written = sum(path.stat().st_size for path in out.glob("*.safetensors"))
    assert record["device"]["weights_bytes"] == written
