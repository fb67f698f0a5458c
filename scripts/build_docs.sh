#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Makes the environment and builds the documentation site, in build/site or the folder that is named. Whatever MkDocs warns of is
# an error, and so is a link that leads nowhere.
case "${1:-}" in -*) echo "usage: scripts/build_docs.sh [FOLDER]   (default: build/site)" >&2; exit 2 ;; esac
. "$(dirname "$0")/common.sh"
ensure_env docs
site=${1:-build/site}
NO_MKDOCS_2_WARNING=1 "$VENV/bin/python" -m mkdocs build --site-dir "$site" # without a notice about MkDocs 2
"$VENV/bin/python" scripts/docs/links.py "$site"
echo "read it, with its search: $VENV/bin/python -m http.server --directory $site"
