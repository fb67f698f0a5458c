#!/usr/bin/env bash
# Shows the whole idea in a few minutes: kernels answered by a precompiled set, one compiled on demand, and the report that
# says what to add to the set. Needs Python >= 3.10 and a C++ compiler; uses an NVIDIA GPU where there is one.
. "$(dirname "$0")/common.sh"
ensure_env
bin=$PWD/$VENV/bin
export FLASHINFER_CACHE_DIR=$PWD/$VENV/demo-cache

target=$("$bin/python" -c 'import torch; from flashinfer import target
print(target.of_device(torch.device("cuda" if torch.cuda.is_available() else "cpu")))')
echo "== precompiling the core set for $target"
"$bin/python" scripts/build_aot.py --config core --target "$target" --jobs auto --exact --out "$VENV/aot-$target"
if ! cmp -s "$VENV/aot-$target/registry.json" "$VENV/aot-installed.json"; then
  echo "== installing it as flashinfer-aot"
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
echo "== serving the shapes of the core models"
"$bin/python" examples/serve_shapes.py
echo "== sentences through a real model"
"$bin/python" examples/minilm.py
echo "== what the precompiled set lacked: flashinfer misses report"
"$bin/flashinfer" misses report
