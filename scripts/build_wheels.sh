#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Make the wheels of flashinfer and flashinfer-aot, and beside each its bill of materials (CycloneDX).
#
#     scripts/build_wheels.sh dist                                    # of the set in flashinfer_aot/flashinfer_aot
#     FLASHINFER_AOT_SET=my_kernels scripts/build_wheels.sh dist      # of another
#
# PYTHON names the Python to use, whose pip has to be there. More arguments are pip's, such as --no-build-isolation.
set -euo pipefail

out=${1:?expected the folder to write to}
shift
# pip builds in folders of its own
[ -z "${FLASHINFER_AOT_SET:-}" ] || export FLASHINFER_AOT_SET=$(realpath "$FLASHINFER_AOT_SET")
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
made=$(mktemp -d)
trap 'rm -rf "$made"' EXIT
"$python" -m pip wheel --quiet --no-deps --wheel-dir "$made" "$@" "$root" "$root/flashinfer_aot"
PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" "$python" -m flashinfer aot sbom "$made"/*.whl >/dev/null
mkdir -p "$out"
cp "$made"/* "$out"
(cd "$made" && for name in *; do echo "$out/$name"; done)
