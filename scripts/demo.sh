#!/usr/bin/env bash
# Quantizes the bundled model, vision tower and MTP head included, to 5.5 bits per weight and measures the result on text and
# images it was not calibrated with.
. "$(dirname "$0")/common.sh"

scripts/build.sh
model=examples/tiny-qwen3_5
out=out/tiny-qwen3_5-5.5bpp
mkdir -p out
set -x
exec build/prismaquant quantize "$model" "$out" --bpp 5.5 --calibration "$model/calibration.txt" \
  --images "$model/samples" --eval-text "$model/heldout.txt" --overwrite
