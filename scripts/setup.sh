#!/usr/bin/env bash
# Installs what building needs, and only what is missing: Debian packages and the virtual environment .venv with torch.
# usage: setup.sh [test] [lint]
#   test   also .venv-test, the environment of the tests' oracles
#   lint   also clang-format, clang-tidy and what the benchmarks include
. "$(dirname "$0")/common.sh"

readonly TORCH=2.13.0
packages=(make cmake ninja-build ccache g++ pkg-config python3-venv nlohmann-json3-dev libcli11-dev libfmt-dev
  libsqlite3-dev libpcre2-dev libutf8proc-dev libstb-dev libgtest-dev libgmock-dev
  libssl-dev)

as_root() {
  if [[ $EUID -eq 0 ]]; then
    "$@"
  else
    command -v sudo > /dev/null || die "cannot install as $(id -un): neither root nor sudo; as root run: $*"
    sudo "$@"
  fi
}

system_packages() {
  local missing=()
  if ! command -v dpkg-query > /dev/null; then
    say "not a Debian system: expecting the equivalents of $*"
    return 0
  fi
  for package in "$@"; do
    [[ $(dpkg-query -W -f '${db:Status-Status}' "$package" 2> /dev/null || true) == installed ]] || missing+=("$package")
  done
  ((${#missing[@]})) || return 0
  say "installing ${missing[*]}"
  as_root env DEBIAN_FRONTEND=noninteractive apt-get update -qq
  as_root env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends "${missing[@]}"
}

python_version() {
  "$PYTHON" -c 'import sys; assert sys.version_info >= (3, 10); print(sys.version)' 2> /dev/null ||
    die "$PYTHON: Python 3.10 or newer is needed (set PYTHON)"
}

# A fresh virtual environment; pip as it is configured for this user.
make_venv() {
  rm -rf "$1"
  "$PYTHON" -m venv "$1"
}

# The CPU build of torch is a tenth of the size; not every package index has it.
torch_venv() {
  make_venv .venv
  if [[ $1 == cpu ]] && .venv/bin/pip install -q "torch==$TORCH+cpu" numpy; then return 0; fi
  .venv/bin/pip install -q "torch==$TORCH" numpy
}

test_venv() {
  make_venv .venv-test
  site_packages .venv > "$(site_packages .venv-test)/prismaquant_torch.pth"
  .venv-test/bin/pip install -q -r tests/requirements.txt
  .venv-test/bin/pip install -q --no-deps -r tests/requirements-data.txt
}

with_test=0
for argument in "$@"; do
  case $argument in
    test) with_test=1 ;;
    lint) packages+=(clang-format clang-tidy libomp-dev libbenchmark-dev) ;;
    *) die "$argument: expected test or lint" ;;
  esac
done
system_packages "${packages[@]}"

device=cpu
if command -v nvidia-smi > /dev/null && nvidia-smi -L > /dev/null 2>&1; then device=cuda; fi
version=$(python_version)
key=$(key_of "$version" "$TORCH" "$device" "$ROOT" < /dev/null)
step "virtual environment .venv with torch $TORCH" .venv/.stamp "$key" torch_venv "$device"
if ((with_test)); then
  key=$(cat tests/requirements.txt tests/requirements-data.txt | key_of "$key")
  step "virtual environment .venv-test with the tests' oracles" .venv-test/.stamp "$key" test_venv
fi
