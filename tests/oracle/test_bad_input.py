"""Bad input: one clear line, the right exit code, and nothing at OUT."""
import json
import os
import pathlib
import shutil
import struct
import subprocess

import pytest

ROOT = pathlib.Path(os.environ["PRISMAQUANT_SOURCE_DIR"])
PROGRAM = os.environ["PRISMAQUANT_BINARY"]
MODEL = ROOT / "examples" / "tiny-qwen3_5"
CALIBRATION = MODEL / "calibration.txt"
SHARD = "model-00001-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    for path in MODEL.iterdir():
        if path.is_file() and path.suffix != ".txt":
            shutil.copy(path, folder)
    return folder


def edit_json(path, change):
    value = json.loads(path.read_text())
    change(value)
    path.write_text(json.dumps(value))


def tensor_begin(path, name):
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    return 8 + size + header[name]["data_offsets"][0] if name in header else None


def poison(folder, name):
    """Writes a NaN over the first value of a BF16 tensor."""
    for path in folder.glob("*.safetensors"):
        begin = tensor_begin(path, name)
        if begin is not None:
            with open(path, "r+b") as file:
                file.seek(begin)
                file.write(b"\xc0\x7f")
            return
    raise KeyError(name)


def refused(args, out, code, *words):
    done = subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True)
    errors = [line for line in done.stderr.splitlines() if line.startswith("prismaquant: ")]
    assert done.returncode == code, done.stderr[-1000:]
    assert len(errors) == 1, done.stderr[-1000:]
    for word in words:
        assert word in errors[0], errors[0]
    assert not out.exists()
    leftovers = [p.name for p in out.parent.iterdir() if "partial" in p.name]
    assert not leftovers


def quantize(source, out, *extra, calibration=CALIBRATION):
    return ["quantize", source, out, "--calibration", calibration, "--samples", "2", "--tokens", "32", "--no-eval", *extra]


BREAKS = {
    "no config": (lambda s: (s / "config.json").unlink(), ["config.json"]),
    "unknown architecture": (lambda s: edit_json(s / "config.json", lambda c: c.update(architectures=["NoSuchModel"])),
                             ["NoSuchModel", "LlamaForCausalLM"]),
    "truncated shard": (lambda s: os.truncate(s / SHARD, (s / SHARD).stat().st_size - 1000), [SHARD]),
    "cut header": (lambda s: os.truncate(s / SHARD, 100), [SHARD]),
    "missing shard": (lambda s: (s / SHARD).unlink(), [SHARD]),
    "path outside": (lambda s: edit_json(s / INDEX, lambda i: i["weight_map"].update({"lm_head.weight": "../x.safetensors"})),
                     ["lm_head.weight", "../x.safetensors"]),
    "wrong shape": (lambda s: edit_json(s / "config.json", lambda c: c["text_config"].update(intermediate_size=321)),
                    ["mlp.gate_proj", "321"]),
    "nan weight": (lambda s: poison(s, "model.language_model.layers.2.mlp.up_proj.weight"),
                   ["model.language_model.layers.2.mlp.up_proj.weight", "finite"]),
    "no tokenizer": (lambda s: (s / "tokenizer.json").unlink(), ["tokenizer.json"]),
    "broken tokenizer": (lambda s: (s / "tokenizer.json").write_text("{"), ["tokenizer.json"]),
    "already quantized": (lambda s: edit_json(s / "config.json", lambda c: c.update(
        quantization_config={"quant_method": "compressed-tensors", "format": "float-quantized"})),
        ["compressed-tensors", "float-quantized"]),
    "mixture of experts": (lambda s: edit_json(s / "config.json", lambda c: c["text_config"].update(num_experts=8)),
                           ["num_experts"]),
}


@pytest.mark.parametrize("name", BREAKS)
def test_broken_source(name, source, tmp_path):
    break_source, words = BREAKS[name]
    break_source(source)
    refused(quantize(source, tmp_path / "out"), tmp_path / "out", 2, *words)


def test_missing_source(tmp_path):
    refused(quantize(tmp_path / "nothing", tmp_path / "out"), tmp_path / "out", 2, "nothing")


def test_wrong_dtype(source, tmp_path):
    path = source / SHARD
    data = path.read_bytes()
    size = struct.unpack("<Q", data[:8])[0]
    header = data[8 : 8 + size].replace(b'"BF16"', b'"I16" ', 1).replace(b'"BF16"', b'"I16" ')
    path.write_bytes(data[:8] + header + data[8 + size :])
    refused(quantize(source, tmp_path / "out"), tmp_path / "out", 2, "I16", "BF16")


def test_short_calibration(tmp_path):
    short = tmp_path / "short.txt"
    short.write_text("Too little text.\n")
    refused(quantize(MODEL, tmp_path / "out", calibration=short), tmp_path / "out", 2, "short.txt", "tokens")


def test_more_samples_than_the_bundled_text_has(tmp_path):
    refused(["quantize", MODEL, tmp_path / "out", "--samples", "100000"], tmp_path / "out", 2, "the bundled calibration text",
            "--samples")


def test_calibration_that_is_not_utf8(tmp_path):
    bad = tmp_path / "bad.txt"
    bad.write_bytes(b"abc \xff\xfe def\n" * 1000)
    refused(quantize(MODEL, tmp_path / "out", calibration=bad), tmp_path / "out", 2, "bad.txt", "UTF-8")


def test_infeasible_budget(tmp_path):
    refused(quantize(MODEL, tmp_path / "out", "--bpp", "3"), tmp_path / "out", 1, "--bpp 3", "4.5")
    assert not (tmp_path / "out.work").exists(), "refused before anything is measured"


def test_infeasible_size(tmp_path):
    refused(quantize(MODEL, tmp_path / "out", "--size", "1MB"), tmp_path / "out", 1, "--size", "smallest")


def test_bad_rule(tmp_path):
    refused(quantize(MODEL, tmp_path / "out", "--pin", "no_such_linear=fp8"), tmp_path / "out", 2, "no_such_linear")
    assert not (tmp_path / "out.work").exists(), "refused before anything is measured"


def test_existing_out_is_kept(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("text")
    for extra in ([], ["--overwrite"]):
        done = subprocess.run([PROGRAM, *map(str, quantize(MODEL, out, *extra))], capture_output=True, text=True)
        assert done.returncode == 2 and str(out) in done.stderr
        assert [p.name for p in out.iterdir()] == ["precious"]


def test_the_source_is_never_overwritten(source, tmp_path):
    """Neither by its own name, nor by another one, nor with the folder that holds it; nor is the run store."""
    link = tmp_path / "link"
    link.symlink_to(source)
    before = {path.name: path.read_bytes() for path in source.iterdir()}
    shutil.copy(source / "config.json", tmp_path)  # so that the folder above looks like a checkpoint
    for out in [source, f"{source}/", link, tmp_path]:
        done = subprocess.run([PROGRAM, *map(str, quantize(source, out, "--work", tmp_path / "w", "--overwrite"))], capture_output=True, text=True)
        assert done.returncode == 2 and str(source) in done.stderr, done.stderr
        assert {path.name: path.read_bytes() for path in source.iterdir()} == before
    done = subprocess.run([PROGRAM, *map(str, quantize(source, tmp_path / "out", "--work", tmp_path / "out" / "w"))], capture_output=True, text=True)
    assert done.returncode == 2 and "out/w" in done.stderr and not (tmp_path / "out").exists()


def test_a_separator_at_the_end_of_out(tmp_path):
    args = quantize(MODEL, f"{tmp_path}/out/", "--uniform", "fp8")
    for _ in range(2):  # the second recognises what the first made
        done = subprocess.run([PROGRAM, *map(str, args)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out.work"]


def test_other_run_in_the_store(tmp_path):
    first = quantize(MODEL, tmp_path / "a", "--work", tmp_path / "work", "--uniform", "fp8")
    assert subprocess.run([PROGRAM, *map(str, first)], capture_output=True).returncode == 0
    refused(quantize(MODEL, tmp_path / "out", "--work", tmp_path / "work", "--seed", "7"), tmp_path / "out", 2, "seed")


def test_full_disk(tmp_path):
    """A file size limit stands in for a full disk: writes fail in the middle of the checkpoint."""
    work = tmp_path / "work"
    args = quantize(MODEL, tmp_path / "out", "--work", work, "--uniform", "fp8")
    shell = f"ulimit -f 2000; trap '' XFSZ; exec {PROGRAM} " + " ".join(map(str, args))
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True)
    assert done.returncode == 3, done.stderr[-1000:]
    assert "File too large" in done.stderr
    assert not (tmp_path / "out").exists()
    assert subprocess.run([PROGRAM, *map(str, args)], capture_output=True).returncode == 0


@pytest.mark.parametrize("args", [["quantize"], ["no-such-command"], ["allocate", "--bytes", "x"],
                                  ["evaluate", "a"], ["quantize", "a", "b", "--uniform", "fp8", "--bpp", "5"],
                                  ["export", "b", "--work", "w", "--choices", "c", "--formats", "fp8"],
                                  ["quantize", "a", "b", "--labels", "other"],
                                  ["quantize", "a", "b", "--calibration", ""]])
def test_bad_usage(args):
    assert subprocess.run([PROGRAM, *args], capture_output=True).returncode == 2
