#!/usr/bin/env bash
# Stage 2: plug vision towers into LLaVA and train them with PEFT.
#   bash scripts/stage2_llava.sh [CONFIG] [key=value ...]     no CONFIG: the miniature; --help says more
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m stage2_llava "$@"
