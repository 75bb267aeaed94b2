#!/usr/bin/env bash
# Everything on the miniature: environment, a new tower, two LLaVAs, and the report that compares them.
#   bash scripts/quickstart.sh      what is finished is not done again
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"
cd "$REPO"
"$PYTHON" -m stage2_llava
"$PYTHON" eval/run.py --tasks mmvp,pope --out runs/mini/eval
