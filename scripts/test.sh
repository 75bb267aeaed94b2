#!/usr/bin/env bash
# Lint, types and tests.
#   bash scripts/test.sh [--slow] [pytest arguments]     --slow: also the tests that take longer than about twenty seconds
#   -n 0 runs them in one process, as --pdb and -s need it
set -euo pipefail
NEED_MODULES="pytest pytest_timeout xdist ruff mypy"
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

selection=()
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then selection=(-m ""); else arguments+=("$argument"); fi
done

# A process per core, each a file of tests at a time (what its tests share is made once): more threads only get into each
# other's way. Eight at most, since each loads torch.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
processes=(-n auto --maxprocesses 8 --dist loadfile)
# No test may depend on the network.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

cd "$REPO"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest "${processes[@]}" ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
