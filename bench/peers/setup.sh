#!/usr/bin/env bash
# Makes the virtual environments of the peers, build/peers/venv-NAME, each with the versions in requirements-NAME.txt; torch is
# seen through .venv. usage: setup.sh NAME...   (llm-compressor, modelopt, upstream)
. "$(dirname "$0")/../../scripts/common.sh"

peer_venv() {
  local venv=$1 requirements=$2
  rm -rf "$venv"
  "$PYTHON" -m venv "$venv"
  site_packages .venv > "$(site_packages "$venv")/prismaquant_torch.pth"
  "$venv/bin/pip" install -q -r "$requirements"
}

scripts/setup.sh test
version=$("$PYTHON" -c 'import sys; print(sys.version)')
for name in "$@"; do
  requirements=bench/peers/requirements-$name.txt
  [[ -f $requirements ]] || die "$name: there is no $requirements"
  venv=build/peers/venv-$name
  step "virtual environment $venv" "$venv/.stamp" "$(key_of "$version" "$ROOT" < "$requirements")" \
    peer_venv "$venv" "$requirements"
done
