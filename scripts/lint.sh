#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the environment and runs every linter on every file, as .pre-commit-config.yaml lists them.
. "$(dirname "$0")/common.sh"
ensure_env cu13 build examples test
PATH="$PWD/$VENV/bin:$PATH" exec "$VENV/bin/pre-commit" run --all-files --show-diff-on-failure "$@"
