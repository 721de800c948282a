#!/usr/bin/env bash
# Serves quantized checkpoints with the real vLLM on the CPU and compares with `prismaquant evaluate`.
# usage: test_vllm.sh [pytest option...]
. "$(dirname "$0")/common.sh"

scripts/setup_vllm.sh
scripts/build.sh prismaquant sequence_dump
model=$ROOT/build/models/smollm2
cmake -DPYTHON="$ROOT/.venv-test/bin/python" -DSCRIPT="$ROOT/examples/smollm2.py" -DOUT="$model" -P tests/make_once.cmake
export PRISMAQUANT_BINARY=$ROOT/build/prismaquant PRISMAQUANT_SOURCE_DIR=$ROOT PRISMAQUANT_SMOLLM2=$model
exec .venv-vllm/bin/python -B -m pytest -p no:cacheprovider -v tests/vllm "$@"
