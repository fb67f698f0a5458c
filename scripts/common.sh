# Sourced by demo.sh, test.sh and lint.sh: makes .venv once. Needs Python >= 3.10 and a C++ compiler; offline afterwards.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
# What the tests are run with; the library itself pins neither. Cubins of the first CUDA 13 compiler run on every driver of
# CUDA 13, and what the tests say of registers and spills is said of this compiler.
TORCH_VERSION=2.13.0
NVRTC_VERSION=13.0.88
export PIP_DISABLE_PIP_VERSION_CHECK=1

# One at a time in a checkout, where there is flock; the lock ends with whoever holds it.
ensure_env() {
  (
    if command -v flock >/dev/null; then flock 9; fi
    make_env
  ) 9<scripts/common.sh
}

make_env() {
  local stamp=$VENV/.flashinfer-env key
  key=$(cat pyproject.toml setup.py build_backend.py packing.py scripts/common.sh flashinfer/version.py | cksum)
  if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$key" ]; then return; fi
  echo "== making $VENV (once)"
  # One that was left halfway, perhaps without a pip that works, is made from nothing. One that somebody else made, which
  # has no stamp, is added to.
  if [ ! -e "$VENV/pyvenv.cfg" ] || [ "$(cat "$stamp" 2>/dev/null)" = unfinished ]; then
    mkdir -p "$VENV"
    echo unfinished >"$stamp"
    find "$VENV" -mindepth 1 -maxdepth 1 ! -path "$stamp" -exec rm -rf {} +
  fi
  if [ -f "$stamp" ]; then echo unfinished >"$stamp"; fi
  python3 -m venv "$VENV"
  # cu13 brings NVRTC and its headers: CUDA kernels compile on any machine. On a machine with an NVIDIA driver torch is the
  # CUDA build that pip offers by default, and chooses its NVRTC itself; elsewhere it is the pinned version, which pip takes
  # as a CPU build where one is offered.
  local pinned=("torch==$TORCH_VERSION" "nvidia-cuda-nvrtc==$NVRTC_VERSION" "nvidia-cuda-runtime==13.0.*")
  if command -v nvidia-smi >/dev/null; then pinned=(torch); fi
  "$VENV/bin/pip" install --quiet "${pinned[@]}"
  "$VENV/bin/pip" install --quiet --editable ".[cu13,build,test,examples]"
  echo "$key" >"$stamp"
}
