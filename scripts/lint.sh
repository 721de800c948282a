#!/usr/bin/env bash
# clang-format and clang-tidy; any finding fails. usage: lint.sh [file.cc...] (default: all)
. "$(dirname "$0")/common.sh"

scripts/setup.sh lint
grep -qs bench/allocate_bench.cc build/compile_commands.json || scripts/build.sh
if (($#)); then
  sources=("$@")
else
  mapfile -t sources < <(git ls-files 'src/*.cc' 'kernels/*.cc' 'tests/*.cc' 'bench/*.cc')
fi
mapfile -t formatted < <((($#)) && printf '%s\n' "$@" || git ls-files '*.cc' '*.h')
clang-format --dry-run -Werror "${formatted[@]}"
# Clang cannot read GCC's precompiled header and does not know all of its options.
mkdir -p build/lint
sed -E 's/-Winvalid-pch -include [^ ]*cmake_pch\.hxx//; s/ -fpch-preprocess| -Wno-restrict//g' \
  build/compile_commands.json > build/lint/compile_commands.json
printf '%s\0' "${sources[@]}" | xargs -0 -n1 -P "$(jobs)" clang-tidy -quiet -p build/lint
