#!/usr/bin/env bash
# Time and memory of stage 1's step on one GPU: the undivided grid against row by row, with and without compilation.
#   bash scripts/benchmark_gpu.sh [--batch-sizes 8,16] [--variants eager,compile] ...     --help says more
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" "$REPO/scripts/benchmark_gpu.py" "$@"
