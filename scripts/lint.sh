#!/usr/bin/env bash
# clang-format and clang-tidy; any finding fails. usage: lint.sh [file.cc...] (default: all)
. "$(dirname "$0")/common.sh"

scripts/setup.sh lint
[[ -f build/compile_commands.json ]] || scripts/build.sh
if (($#)); then
  sources=("$@")
else
  mapfile -t sources < <(git ls-files 'src/*.cc' 'kernels/*.cc' 'tests/*.cc')
fi
mapfile -t formatted < <((($#)) && printf '%s\n' "$@" || git ls-files '*.cc' '*.h')
clang-format --dry-run -Werror "${formatted[@]}"
# GCC's own warning names are unknown to clang.
printf '%s\0' "${sources[@]}" |
  xargs -0 -n1 -P "$(jobs)" clang-tidy -quiet -p build --extra-arg=-Wno-unknown-warning-option \
    --extra-arg=-Wno-unused-command-line-argument --extra-arg=-Wno-ignored-optimization-argument
