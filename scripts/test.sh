#!/usr/bin/env bash
# Makes the environment and runs the tests. Arguments go to pytest: scripts/test.sh -k rmsnorm
. "$(dirname "$0")/common.sh"
ensure_env
exec "$VENV/bin/python" -m pytest "$@"
