#!/usr/bin/env bash
# Makes the environment and runs the tests, on two cores or more in several processes. Arguments go to pytest:
# scripts/test.sh -k rmsnorm. Later ones win: -n 0 keeps all in one process, -m slow or -m fuzz runs what takes minutes.
. "$(dirname "$0")/common.sh"
ensure_env
cores=$(getconf _NPROCESSORS_ONLN)
workers=$((cores < 4 ? cores : 4))
# Of the cores of a machine each worker gets its share; more threads than that would wait for each other.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores / workers))}"
exec "$VENV/bin/python" -m pytest -n "$workers" --dist worksteal "$@"
