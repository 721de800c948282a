#!/usr/bin/env python3
"""Quantizes one model with other tools and with PrismaQuant, measures all results in the same way and prints a table.

usage: run.py SOURCE --calibration TEXT --text TEXT --out DIR [--only REGEX]

Each row keeps its files and its result in DIR/ROW; a row that is there with the same settings, inputs and tool is not run again. A row that
fails says why, and the others go on. README.md beside this file says what the rows are.
"""
from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
WEIGHTS_ALONE = "-weights"
NVFP4_BITS = 4.5  # at this budget every allocation is NVFP4 everywhere
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONDONTWRITEBYTECODE": "1"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: commands that leave a checkpoint in the row's folder, print what they measured themselves, or
    prepare what other rows have in common."""
    name: str
    tool: str
    settings: str
    steps: list[list[str]]
    venvs: tuple[str, ...] = ()
    budget: float | None = None
    ours: bool = False
    weights_alone: bool = False  # activations are not quantized
    leaves: str = "checkpoint"  # "measurement", "preparation"
    needs: Row | None = None


@dataclasses.dataclass
class Usage:
    """Of child processes: times add up, the peak is that of the largest."""
    wall_s: float = 0
    cpu_s: float = 0
    peak_mb: float = 0

    def add(self, wall_s: float, cpu_s: float, peak_mb: float) -> None:
        self.wall_s += wall_s
        self.cpu_s += cpu_s
        self.peak_mb = max(self.peak_mb, peak_mb)


class Failed(Exception):
    """A step that exited with another code than 0; the message is what it said last."""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", type=pathlib.Path, help="checkpoint folder")
    parser.add_argument("--calibration", type=pathlib.Path, required=True, help="calibration text")
    parser.add_argument("--text", type=pathlib.Path, required=True, help="held-out text")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder for checkpoints, logs and results")
    parser.add_argument("--samples", type=int, default=8, help="calibration windows (8)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of a calibration window (512)")
    parser.add_argument("--eval-tokens", type=int, default=4096, help="held-out tokens (4096)")
    parser.add_argument("--budgets", type=float, nargs="+", default=[4.5, 4.75, 5.5, 6.0], help="bits per weight (4.5 4.75 5.5 6.0)")
    parser.add_argument("--prismaquant", type=pathlib.Path, default=ROOT / "build/prismaquant", help="the program (build/prismaquant)")
    parser.add_argument("--only", default="", metavar="REGEX", help="rows to run; the table shows finished ones too")
    arguments = parser.parse_args()
    for name in ("source", "calibration", "text", "prismaquant"):
        path = getattr(arguments, name).resolve()
        if not path.exists():
            parser.error(f"{path}: not found")
        setattr(arguments, name, path)
    arguments.out = arguments.out.resolve()
    return arguments


# ---- what results depend on

def hash_of(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


@functools.cache
def file_hash(path: pathlib.Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


@functools.cache
def model_hash(folder: pathlib.Path) -> str:
    """Of its small files the contents, of its weights the sizes."""
    parts = [(path.name, path.stat().st_size if path.suffix == ".safetensors" else file_hash(path))
             for path in sorted(folder.iterdir()) if path.is_file()]
    return hash_of(parts)


# ---- rows

def pinned(venv: str, package: str) -> str:
    """The version of a package that setup.sh installs."""
    requirements = (HERE / f"requirements-{venv}.txt").read_text()
    return re.search(rf"^{package}(?:\[.*\])?==(\S+)", requirements, re.MULTILINE)[1]


def script(venv: str, name: str) -> list[str]:
    return [str(ROOT / f"build/peers/venv-{venv}/bin/python"), str(HERE / name)]


def calibration_options(arguments: argparse.Namespace) -> list[str]:
    return ["--calibration", str(arguments.calibration), "--samples", str(arguments.samples), "--tokens", str(arguments.tokens)]


def llm_compressor(arguments: argparse.Namespace, folder: pathlib.Path, *options: str) -> list[str]:
    return [*script("llm-compressor", "llm_compressor.py"), str(arguments.source), str(folder / "checkpoint"),
            *calibration_options(arguments), *options]


def held_out_options(arguments: argparse.Namespace, tokens: str) -> list[str]:
    """The text to measure on, and the file of the source's log-probabilities on it."""
    inputs = [model_hash(arguments.source), file_hash(arguments.text), arguments.eval_tokens]
    return ["--text", str(arguments.text), tokens, str(arguments.eval_tokens),
            "--reference", str(arguments.out / f"reference-{hash_of(inputs)[:16]}.pt")]


def uniform_rows(arguments: argparse.Namespace) -> list[Row]:
    tool = f"llm-compressor {pinned('llm-compressor', 'llmcompressor')}"
    cases = {"nvfp4": ["--scheme", "NVFP4"], "nvfp4-gptq": ["--scheme", "NVFP4", "--gptq"],
             "nvfp4a16-gptq": ["--scheme", "NVFP4A16", "--gptq"], "mxfp8": ["--scheme", "MXFP8"], "fp8": ["--scheme", "FP8_DYNAMIC"]}
    rows = []
    for case, options in cases.items():
        name = f"llm-compressor-{case}"
        settings = f"{options[1]}, {'GPTQ' if '--gptq' in options else 'to nearest'}"
        rows.append(Row(name, tool, settings, [llm_compressor(arguments, arguments.out / name, *options)], ("llm-compressor",),
                        weights_alone="A16" in options[1]))
    return rows


def modelopt_rows(arguments: argparse.Namespace, budgets: list[float]) -> list[Row]:
    """A search scores every choice once; the budgets share its file."""
    tool = f"modelopt {pinned('modelopt', 'nvidia-modelopt')}"
    rows = []
    for suffix, options, words in [("", [], "bits as it counts them"), ("-stored-bits", ["--stored-bits"], "bits as stored")]:
        scores = f"modelopt-scores{suffix}"
        command = [*script("modelopt", "model_optimizer.py"), str(arguments.source), *calibration_options(arguments), *options,
                   "--scores", str(arguments.out / scores / "scores.pt")]
        preparation = Row(scores, tool, f"auto_quantize: scores, {words}", [[*command, "--bpp", str(budgets[0])]], ("modelopt",),
                          leaves="preparation")
        rows.append(preparation)
        for budget in budgets:
            measure = [*command, "--bpp", str(budget), *held_out_options(arguments, "--eval-tokens")]
            rows.append(Row(f"modelopt-{budget:g}{suffix}", tool, f"auto_quantize NVFP4, MXFP8 at {budget:g}, {words}", [measure],
                            ("modelopt",), budget, leaves="measurement", needs=preparation))
    return rows


def upstream_rows(arguments: argparse.Namespace, budgets: list[float]) -> list[Row]:
    version = pinned("upstream", "prismaquant")
    tool = f"published PrismaQuant {version}, llm-compressor to nearest"
    work = str(arguments.out / "upstream-costs/work")
    command = [*script("upstream", "upstream.py"), str(arguments.source), "--work", work]
    costs = Row("upstream-costs", f"published PrismaQuant {version}", "probe and costs", [[*command, *calibration_options(arguments)]],
                ("upstream",), leaves="preparation")
    rows = [costs]
    for budget in budgets:
        for suffix, formats in [("", "NVFP4,FP8_DYNAMIC,BF16"), ("-mxfp8", "NVFP4,MXFP8,BF16")]:
            name = f"upstream-{budget:g}{suffix}"
            folder = arguments.out / name
            choices = str(folder / "choices.json")
            steps = [[*command, "--choose", choices, "--bpp", str(budget), "--formats", formats],
                     llm_compressor(arguments, folder, "--choices", choices)]
            rows.append(Row(name, tool, f"{formats.replace(',', ', ')} at {budget:g}", steps, ("upstream", "llm-compressor"), budget,
                            needs=costs))
    return rows


def our_rows(arguments: argparse.Namespace, budgets: list[float]) -> list[Row]:
    """A probe for each calibration, plain and smoothed; budgets and formats share it."""
    program = str(arguments.prismaquant)
    tool = f"PrismaQuant {subprocess.run([program, '--version'], capture_output=True, text=True, check=True).stdout.strip()}"
    windows = calibration_options(arguments)
    rows = []
    cases = [("", windows, ""), ("-smooth", [*windows, "--smooth"], ""),
             ("-default-calibration", [*windows[:2], "--smooth"], ", its default calibration")]
    for suffix, options, words in cases:
        probe_name = f"prismaquant-probe{suffix}"
        store = ["--work", str(arguments.out / probe_name / "work"), *options]
        probe = Row(probe_name, tool, f"probe{words}", [[program, "probe", str(arguments.source), *store]], ours=True,
                    leaves="preparation")
        rows.append(probe)
        for budget in budgets:
            formats = {"": []}
            if suffix == "-smooth":
                formats |= {"-mxfp8": ["--formats", "nvfp4,mxfp8,bf16"], WEIGHTS_ALONE: ["--formats", "nvfp4a16,int8,bf16"]}
            for kind, format_options in formats.items():
                name = f"prismaquant-{budget:g}{suffix}{kind}"
                command = [program, "quantize", str(arguments.source), str(arguments.out / name / "checkpoint"), *store,
                           "--bpp", str(budget), *format_options, "--no-eval"]
                settings = " ".join([f"--bpp {budget:g}", *(option for option in options if option == "--smooth"), *format_options]) + words
                rows.append(Row(name, tool, settings, [command], budget=budget, ours=True, weights_alone=kind == WEIGHTS_ALONE,
                                needs=probe))
    return rows


def all_rows(arguments: argparse.Namespace) -> list[Row]:
    mixed = [budget for budget in arguments.budgets if budget > NVFP4_BITS]
    peers = [*modelopt_rows(arguments, mixed), *upstream_rows(arguments, mixed)] if mixed else []
    return [Row("source", "the source itself", "", []), *uniform_rows(arguments), *peers, *our_rows(arguments, arguments.budgets)]


# ---- running a row

def key_of(row: Row, arguments: argparse.Namespace) -> str:
    """Changes with everything that the row's figures depend on."""
    tools = [file_hash(HERE / f"requirements-{venv}.txt") for venv in row.venvs] or [row.ours and file_hash(arguments.prismaquant)]
    inputs = [model_hash(arguments.source), file_hash(arguments.calibration), file_hash(arguments.text), arguments.eval_tokens]
    return hash_of([row.steps, tools, inputs, row.needs and key_of(row.needs, arguments)])


def cached(row: Row, arguments: argparse.Namespace) -> dict | None:
    path = arguments.out / row.name / "result.json"
    if not path.exists():
        return None
    stored = json.loads(path.read_text())
    return stored["result"] if stored["key"] == key_of(row, arguments) else None


def last_words(log: pathlib.Path) -> str:
    """The last line that names an error, else the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()] or ["no message"]
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|Exception|error)\b.*:", line)]
    return (errors or lines)[-1][:200]


def run_step(command: list[str], folder: pathlib.Path, name: str, usage: Usage) -> str:
    """Runs a command in the row's folder and gives its standard output."""
    output, log = folder / f"{name}.out", folder / f"{name}.log"
    begin = time.monotonic()
    with output.open("w") as out, log.open("w") as err:
        process = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err, env={**os.environ, **ENVIRONMENT})
        _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    usage.add(time.monotonic() - begin, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
    if process.returncode != 0:
        raise Failed(last_words(log))
    return output.read_text()


def run_row(row: Row, arguments: argparse.Namespace) -> dict:
    subprocess.run([HERE / "setup.sh", *row.venvs], check=True, stdout=sys.stderr)
    folder = arguments.out / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    usage = Usage()
    printed = ""
    for number, command in enumerate(row.steps, 1):
        printed = run_step(command, folder, f"step{number}", usage)
    if row.leaves == "checkpoint":
        checkpoint = folder / "checkpoint" if row.steps else arguments.source
        evaluate = [str(ROOT / ".venv-test/bin/python"), str(HERE / "evaluate.py"), str(arguments.source), str(checkpoint),
                    *held_out_options(arguments, "--tokens")]
        printed = run_step(evaluate, folder, "evaluate", Usage())
    measured = {} if row.leaves == "preparation" else json.loads(printed.splitlines()[-1])
    result = {"resources": dataclasses.asdict(usage), **measured}
    (folder / "result.json").write_text(json.dumps({"key": key_of(row, arguments), "result": result}, indent=1))
    return result


def obtain(row: Row, arguments: argparse.Namespace, results: dict[str, dict]) -> None:
    """Puts the row's result among the results: from its folder, or by running it and what it needs. A failure is {"failed": why}."""
    if row.name in results:
        return
    result = cached(row, arguments)
    if result is None:
        if row.needs:
            obtain(row.needs, arguments, results)
        print(f"== {row.name}", file=sys.stderr, flush=True)
        try:
            if row.needs and "failed" in results[row.needs.name]:
                raise Failed(results[row.needs.name]["failed"])
            result = run_row(row, arguments)
        except Failed as failure:
            result = {"failed": str(failure)}
            print(f"   failed: {failure}", file=sys.stderr, flush=True)
    results[row.name] = result


def collect(rows: list[Row], arguments: argparse.Namespace) -> dict[str, dict]:
    results: dict[str, dict] = {}
    for row in rows:
        if re.search(arguments.only, row.name) or cached(row, arguments):
            obtain(row, arguments, results)
    return results


# ---- tables

def markdown(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *lines])


def result_cells(row: Row, result: dict) -> list[str]:
    if "failed" in result:
        return [row.tool, f"{row.settings}: cannot run: {result['failed'].replace('|', '/')}", *["-"] * 8]
    measured = ["-"] * 5
    if row.leaves != "preparation":
        measured = ["-" if result["file_bytes"] is None else f"{result['file_bytes']:,}", f"{result['bpp']:.3f}",
                    f"{result['kl']:.4f} ± {result['kl_stderr']:.4f}", f"{result['ppl']:.2f}", f"{100 * result['top1']:.1f} %"]
    used = result["resources"]
    return [row.tool, row.settings, *measured,
            *([f"{used['wall_s']:.0f}", f"{used['cpu_s']:.0f}", f"{used['peak_mb']:.0f}"] if row.steps else ["-"] * 3)]


def ratio(ours: list[float], theirs: list[float]) -> str:
    """Ratio of the means, with its standard error from the differences window by window."""
    count, mean = len(ours), sum(theirs) / len(theirs)
    quotient = sum(ours) / count / mean
    spread = sum((a - quotient * b) ** 2 for a, b in zip(ours, theirs)) / (count - 1)
    return f"{quotient:.3f} ± {math.sqrt(spread / count) / mean:.3f}"


def comparison_cells(row: Row, rows: list[Row], results: dict[str, dict]) -> list[str]:
    """Our row beside the peer of the least divergence that is not larger than the budget, or than ours, and like ours quantizes
    activations or does not."""
    result = results[row.name]
    most = max(row.budget, result["bpp"])
    peers = [peer for peer in rows if peer.steps and not peer.ours and peer.weights_alone == row.weights_alone
             and results.get(peer.name, {}).get("bpp", math.inf) <= most]
    ours = [row.settings, f"{result['bpp']:.3f}", f"{result['kl']:.4f}"]
    if not peers:
        return [*ours, "none", "-", "-", "-"]
    best = min(peers, key=lambda peer: results[peer.name]["kl"])
    theirs = results[best.name]
    return [*ours, f"{best.tool}: {best.settings}", f"{theirs['bpp']:.3f}", f"{theirs['kl']:.4f}",
            ratio(result["kl_windows"], theirs["kl_windows"])]


def main() -> None:
    arguments = parse_arguments()
    rows = all_rows(arguments)
    results = collect(rows, arguments)
    shown = [row for row in rows if row.name in results]
    print(markdown(["tool", "settings", "bytes of files", "bpp", "KL", "perplexity", "top-1", "wall s", "CPU s", "peak MB"],
                   [result_cells(row, results[row.name]) for row in shown]))
    ours = [row for row in shown if row.ours and "kl" in results[row.name]]
    if ours:
        print()
        print(markdown(["PrismaQuant", "bpp", "KL", "best peer at no more bits", "its bpp", "its KL", "ratio of the KLs"],
                       [comparison_cells(row, rows, results) for row in ours]))


if __name__ == "__main__":
    main()
