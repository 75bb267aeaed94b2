#!/usr/bin/env bash
# Lint, types and tests.
#   bash scripts/test.sh [--slow] [pytest arguments]     --slow: also the tests that take longer than about twenty seconds
set -euo pipefail
NEED_MODULES="pytest pytest_timeout ruff mypy"
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"

selection=()
arguments=()
for argument in "$@"; do
    if [ "$argument" = --slow ]; then selection=(-m ""); else arguments+=("$argument"); fi
done

# Many small processes on few cores: more threads only get into each other's way.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-2}"
# No test may depend on the network.
export HF_HUB_OFFLINE="${HF_HUB_OFFLINE:-1}"

cd "$REPO"
"$PYTHON" -m ruff check .
"$PYTHON" -m ruff format --check .
"$PYTHON" -m mypy
exec "$PYTHON" -m pytest ${selection[@]+"${selection[@]}"} ${arguments[@]+"${arguments[@]}"}
