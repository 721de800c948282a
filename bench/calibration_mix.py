#!/usr/bin/env python3
"""Quantizes one model with different calibration texts and prints the KL of each on held-out text of each domain, as a table.

usage: calibration_mix.py PROGRAM SOURCE --out DIR [--bpp 4.75] [--tokens 4096]

The texts are the bundled mixture and, of each data/heldout-DOMAIN.txt, the first half; measured is on the second halves. A row keeps its result in
DIR and is not run again with the same numbers.
"""
from __future__ import annotations

import argparse
import json
import pathlib
import subprocess

DATA = pathlib.Path(__file__).resolve().parents[1] / "data"
DOMAINS = ("prose", "code", "multilingual")
SEQUENCE = 512


def halves(domain: str) -> tuple[str, str]:
    """The two halves of a held-out text, cut at a blank line."""
    text = (DATA / f"heldout-{domain}.txt").read_text(encoding="utf-8")
    middle = text.index("\n\n", len(text) // 2)
    return text[:middle], text[middle:].lstrip("\n")


def run(program: pathlib.Path, *arguments: object) -> None:
    subprocess.run([program, *map(str, arguments)], check=True, stdout=subprocess.DEVNULL)


def measure(program: pathlib.Path, source: pathlib.Path, folder: pathlib.Path, text: pathlib.Path | None, samples: int, bpp: float,
            tokens: int) -> dict[str, dict]:
    """KL on each domain of the model calibrated with `samples` sequences of the text, or of the bundled one."""
    result = folder / "result.json"
    if result.exists():
        return json.loads(result.read_text())
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint"
    run(program, "quantize", source, checkpoint, "--work", folder / "work", "--bpp", bpp, "--smooth", "--samples", samples, "--tokens",
        SEQUENCE, "--no-eval", "--overwrite", *(["--calibration", text] if text else []))
    measured = {}
    for domain in DOMAINS:
        figures = folder / f"{domain}.json"
        run(program, "evaluate", source, checkpoint, "--text", folder.parent / f"{domain}-second.txt", "--eval-tokens", tokens, "--json", figures)
        measured[domain] = json.loads(figures.read_text())
    result.write_text(json.dumps(measured))
    return measured


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("program", type=pathlib.Path)
    parser.add_argument("source", type=pathlib.Path)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--bpp", type=float, default=4.75)
    parser.add_argument("--tokens", type=int, default=4096)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    texts: dict[str, pathlib.Path | None] = {"bundled": None}
    for domain in DOMAINS:
        first, second = halves(domain)
        texts[domain] = arguments.out / f"{domain}-first.txt"
        texts[domain].write_text(first, encoding="utf-8")
        (arguments.out / f"{domain}-second.txt").write_text(second, encoding="utf-8")
    print("| calibration | tokens |", " | ".join(DOMAINS), "|")
    print("|---" * (2 + len(DOMAINS)) + "|")
    for name, samples in [(domain, 8) for domain in DOMAINS] + [("bundled", 8), ("bundled", 32)]:
        folder = arguments.out / f"{name}-{samples}x{SEQUENCE}-{arguments.bpp}-{arguments.tokens}"
        measured = measure(arguments.program, arguments.source, folder, texts[name], samples, arguments.bpp, arguments.tokens)
        cells = [f"{measured[domain]['kl']:.3f} ± {measured[domain]['kl_stderr']:.3f}" for domain in DOMAINS]
        print(f"| {name} | {samples * SEQUENCE} |", " | ".join(cells), "|", flush=True)


if __name__ == "__main__":
    main()
