#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the environment and runs the tests, in as many processes as cores, four at most; in one where there is a GPU, whose
# time and memory tests measure. Arguments go to pytest, later ones win: scripts/test.sh -k rmsnorm -n 0
. "$(dirname "$0")/common.sh"
ensure_env cu13 build examples test
cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 4 ? cores : 4))
if command -v nvidia-smi >/dev/null || [ "$workers" = 1 ]; then workers=0; fi
# Each worker's kernels get its share of the cores: threads beyond that wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / (workers > 0 ? workers : 1)))}"
exec "$VENV/bin/python" -m pytest -n "$workers" --dist worksteal "$@"
