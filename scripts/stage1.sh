#!/usr/bin/env bash
# Stage 1: post-train a vision tower with Diffusion Contrastive Reconstruction.
#   bash scripts/stage1.sh [CONFIG] [key=value ...]     no CONFIG: the miniature; --help says more
set -euo pipefail
source "$(dirname -- "${BASH_SOURCE[0]}")/_env.sh"
exec "$PYTHON" -m stage1_dcr "$@"
