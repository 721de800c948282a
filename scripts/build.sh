#!/usr/bin/env bash
# Builds build/prismaquant (Release). usage: build.sh [ninja target...]
. "$(dirname "$0")/common.sh"

scripts/setup.sh
cmake -S . -B build -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_EXPORT_COMPILE_COMMANDS=ON -DPRISMAQUANT_BENCH=ON \
  -DPRISMAQUANT_PYTHON="$ROOT/.venv/bin/python" -DPRISMAQUANT_TEST_PYTHON="$ROOT/.venv-test/bin/python" \
  --no-warn-unused-cli
cmake --build build -j "$(jobs)" --target "${@:-prismaquant}"
