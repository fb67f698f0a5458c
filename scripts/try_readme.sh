#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# Does what README.md says first, as it is printed there, in a clean environment: installs from a copy of this checkout,
# then runs the command and the example, away from the sources. Minutes, and what pip downloads; leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
mkdir "$work/checkout" "$work/elsewhere"
git ls-files -z | tar --null --files-from=- -cf - | tar -xf - -C "$work/checkout"
# The fenced blocks of one language, in order: block LANGUAGE NUMBER
block() { awk -v fence="\`\`\`$1" -v want="$2" '/^```/ { inside = !inside && $0 == fence && ++count == want; next } inside' README.md; }
block "" 1 >"$work/install.sh"
block python 1 >"$work/example.py"

python3 -m venv "$work/venv"
PATH=$work/venv/bin:$PATH
unset PYTHONPATH PYTHONHOME FLASHINFER_AOT_PATH
export FLASHINFER_CACHE_DIR=$work/cache PIP_DISABLE_PIP_VERSION_CHECK=1
(cd "$work/checkout" && while read -r line; do
  echo "== $line"
  bash -euo pipefail -c "$line" </dev/null
done <"$work/install.sh")

cd "$work/elsewhere"
echo "== flashinfer"
flashinfer
echo "== flashinfer aot list"
flashinfer aot list
flashinfer aot verify
echo "== flashinfer doctor"
flashinfer doctor
echo "== the example"
python "$work/example.py"
echo "== README.md says what works"
