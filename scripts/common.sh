# SPDX-License-Identifier: Apache-2.0
# Sourced by demo.sh, test.sh and lint.sh: makes one .venv, to which each adds what it needs and the others did not. Needs
# Python >= 3.10 and a C++ compiler; offline afterwards.
# shellcheck shell=bash
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VENV=.venv
# What the tests are run with; the library itself pins neither. Cubins of the first CUDA 13 compiler run on every driver of
# CUDA 13, and what the tests say of registers and spills is said of this compiler.
TORCH_VERSION=2.13.0
NVRTC_VERSION=13.0.88
export PIP_DISABLE_PIP_VERSION_CHECK=1
# Images of containers often set it. Packages are installed without bytecode, and every process would compile torch again.
unset PYTHONDONTWRITEBYTECODE

# A line of progress; demo.sh says how long it will take, too.
say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }

# One at a time in a checkout, where there is flock; the lock ends with whoever holds it.
locked() {
  (
    if command -v flock >/dev/null; then flock 9; fi
    "$@"
  ) 9<scripts/common.sh
}

# ensure_env NAME…: extras and dependency groups of pyproject.toml, and the library.
ensure_env() { locked add_extras "$@"; }
# ensure_packages PACKAGE…: without what they require.
ensure_packages() { locked add_packages "$@"; }

# The stamp of an environment that is whole: of what it was made, and the extras and groups it has.
STAMP=$VENV/.flashinfer-env
env_key() {
  cat pyproject.toml flashinfer_aot/pyproject.toml setup.py build_backend.py packing.py scripts/common.sh flashinfer/version.py | cksum
}
env_extras() { sed -n 2p "$STAMP" 2>/dev/null || true; }

has_env() {
  local had extra
  if [ "$(sed -n 1p "$STAMP" 2>/dev/null)" != "$(env_key)" ]; then return 1; fi
  had=" $(env_extras) "
  for extra in "$@"; do
    if [[ $had != *" $extra "* ]]; then return 1; fi
  done
}

add_extras() {
  if has_env "$@"; then return; fi
  local extras pinned backend name project groups=()
  extras=$(printf '%s\n' $(env_extras) "$@" | sort -u | paste -sd ' ')
  say "making $VENV: $extras"
  # One that was left halfway, perhaps without a pip that works, is made from nothing. One that somebody else made, which
  # has no stamp, is added to.
  if [ ! -e "$VENV/pyvenv.cfg" ] || [ "$(cat "$STAMP" 2>/dev/null)" = unfinished ]; then
    mkdir -p "$VENV"
    echo unfinished >"$STAMP"
    find "$VENV" -mindepth 1 -maxdepth 1 ! -path "$STAMP" -exec rm -rf {} +
  fi
  if [ -f "$STAMP" ]; then echo unfinished >"$STAMP"; fi
  python3 -m venv "$VENV"
  # cu13 brings NVRTC and its headers: CUDA kernels compile on any machine. On a machine with an NVIDIA driver torch is the
  # CUDA build that pip offers by default, and chooses its NVRTC itself; elsewhere it is the pinned version, which pip takes
  # as a CPU build where one is offered.
  pinned=("torch==$TORCH_VERSION" "nvidia-cuda-nvrtc==$NVRTC_VERSION" "nvidia-cuda-runtime==13.0.*")
  if command -v nvidia-smi >/dev/null; then pinned=(torch); fi
  # What packs both wheels, for those that are made offline.
  mapfile -t backend < <(grep -h '^requires = ' pyproject.toml flashinfer_aot/pyproject.toml | grep -o '"[^"]*"' | tr -d '"' | sort -u)
  project=.
  for name in $extras; do
    if is_group "$name"; then groups+=(--group "$name"); else project+=,$name; fi
  done
  if [[ $project == .,* ]]; then project=".[${project#.,}]"; fi
  if [ "${#groups[@]}" -gt 0 ]; then pip_install "pip>=25.1"; fi # the first that knows groups
  pip_install "${pinned[@]}" "${backend[@]}" "${groups[@]}" --editable "$project"
  printf '%s\n%s\n' "$(env_key)" "$extras" >"$STAMP"
}

is_group() { sed -n '/^\[dependency-groups\]$/,/^\[tool/p' pyproject.toml | grep -q "^$1 = "; }

add_packages() {
  local package missing=()
  for package in "$@"; do
    if ! compgen -G "$VENV/lib/python*/site-packages/${package//-/_}-*.dist-info" >/dev/null; then missing+=("$package"); fi
  done
  if [ "${#missing[@]}" -gt 0 ]; then pip_install --no-deps "${missing[@]}"; fi
}

# Python compiles the modules that are imported; pip would compile all of torch.
pip_install() { "$VENV/bin/pip" install --no-compile --progress-bar off "$@" | tell_of_pip; }

# Of what pip says, what is fetched and installed; while it is silent, how much is there.
tell_of_pip() {
  local line
  while true; do
    if IFS= read -r -t 5 line; then
      case $line in
        *"Downloading "* | *"Using cached "*) say "  ${line#"${line%%[![:space:]]*}"}" ;;
        "Processing /"*) line=${line%% (from *} && say "  ${line##*/}" ;;
        "Installing collected packages: "*) say "  installing $(($(tr -cd , <<<"$line" | wc -c) + 1)) packages" ;;
        "Successfully installed "*) say "  installed" ;;
      esac
    elif [ $? -gt 128 ]; then # of time
      say "  $(du -sm "$VENV" | cut -f1) MB in $VENV"
    else
      return 0
    fi
  done
}
