"""Plans chosen by measured KL: what is measured before a checkpoint is written is what it then has."""

import json
import os
import subprocess

import pytest
from reference_models import bundled_model

PROGRAM = os.environ["PRISMAQUANT_BINARY"]


def quantize(out, *options, expect=0):
    source = bundled_model()
    done = subprocess.run([PROGRAM, "quantize", source, out, "--calibration", source / "calibration.txt", "--samples", "3", "--tokens",
                           "64", "--precision", "float32", "--json", "-", *map(str, options)],
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == expect, done.stderr
    return json.loads(done.stdout) if expect == 0 else done.stderr


@pytest.mark.parametrize("options", [(), ("--smooth",), ("--render", "rtn")])
def test_the_checkpoint_has_the_measured_kl(options, tmp_path):
    validated = quantize(tmp_path / "out", "--bpp", "5", "--validate", "1", "--eval-tokens", "100000", *options)
    (point,) = validated["validation"]["points"]
    assert point["chosen"] and point["file_bytes"] == validated["file_bytes"]
    # The whole tail, of which the run measured the first half before and the second after.
    whole = quantize(tmp_path / "whole", "--bpp", "5", "--eval-tokens", "16384", *options)
    assert whole["choices"] == validated["choices"]
    first, both = validated["evaluation"], whole["evaluation"]
    second = (both["kl"] * both["tokens"] - first["kl"] * first["tokens"]) / (both["tokens"] - first["tokens"])
    assert point["kl"] == pytest.approx(second, rel=1e-3)
    assert validated["validation"]["ratio"] == pytest.approx(point["kl"] / point["predicted_kl"])


def test_points_of_the_sweep_are_measured_and_kept(tmp_path):
    work = tmp_path / "work"
    first = quantize(tmp_path / "out", "--bpp", "5.5", "--validate", "3", "--no-eval", "--work", work)
    points = first["validation"]["points"]
    assert [p["bpp"] for p in points] == sorted(p["bpp"] for p in points) and len(points) == 3
    assert [p["kl"] for p in points] == sorted((p["kl"] for p in points), reverse=True)
    assert next(p["bpp"] for p in points if p["chosen"]) == first["bpp"]
    assert json.loads((tmp_path / "out" / "prismaquant.json").read_text())["validation"] == first["validation"]
    assert not list((work / "render").glob("*/*"))
    again = quantize(tmp_path / "again", "--bpp", "5.5", "--validate", "3", "--no-eval", "--work", work)
    assert again["validation"] == first["validation"] and "validate" not in again["stages"]


def test_a_limit_is_held_by_measurement(tmp_path):
    work = tmp_path / "work"
    sweep = quantize(tmp_path / "sweep", "--bpp", "4.5", "--validate", "9", "--no-eval", "--work", work)["validation"]["points"]
    assert len(sweep) == 8  # 4.5 is one of the sweep
    limit = (sweep[1]["kl"] + sweep[2]["kl"]) / 2
    found = quantize(tmp_path / "out", "--max-kl", limit, "--validate", "6", "--no-eval", "--work", work)
    chosen = next(p for p in found["validation"]["points"] if p["chosen"])
    assert chosen["kl"] <= limit < sweep[1]["kl"]
    smaller = [p for p in found["validation"]["points"] if p["file_bytes"] < chosen["file_bytes"]]
    assert all(p["kl"] > limit for p in smaller)
    assert chosen["file_bytes"] < sweep[3]["file_bytes"]


def test_a_limit_that_only_predictions_hold_is_refused(tmp_path):
    """By the Fisher trace, which sees no activations, plans are predicted to lose far less than they do."""
    options = ("--cost", "fisher-trace", "--no-eval", "--work", tmp_path / "work", "--formats", "nvfp4,fp8")
    (point,) = quantize(tmp_path / "out", "--bpp", "8", "--validate", "1", *options)["validation"]["points"]
    limit = (point["kl"] + point["predicted_kl"]) / 2
    assert point["predicted_kl"] < limit
    refused = quantize(tmp_path / "refused", "--max-kl", limit, "--validate", "1", *options, expect=1)
    assert "1 measured plans" in refused and not (tmp_path / "refused").exists()
    assert not list((tmp_path / "work" / "render").glob("*/*"))


def test_the_knee_is_that_of_measured_points(tmp_path):
    work = tmp_path / "work"
    found = quantize(tmp_path / "out", "--knee", "--validate", "9", "--no-eval", "--work", work)
    points = found["validation"]["points"]
    x, y = [p["bpp"] for p in points], [p["kl"] for p in points]
    below = [(b - x[0]) / (x[-1] - x[0]) + (k - y[-1]) / (y[0] - y[-1]) for b, k in zip(x, y)]
    assert points[below.index(min(below))]["chosen"]
    assert not list((work / "render").glob("*/*"))


def test_scores_are_no_kl(tmp_path):
    assert "--labels data" in quantize(tmp_path / "out", "--labels", "data", "--validate", "2", expect=2)
