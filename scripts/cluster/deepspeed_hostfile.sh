#!/usr/bin/env bash
# A run on the machines of a hostfile, started by DeepSpeed's launcher (it needs pdsh and SSH without a password).
#   HOSTFILE=scripts/cluster/hostfile.example bash scripts/cluster/deepspeed_hostfile.sh CONFIG [key=value ...]
# This launcher kills processes 30 seconds after it was told to stop, and exits with 1 although they have saved; where
# machines are taken away, prefer torchrun_ssh.sh or slurm.sbatch.
set -euo pipefail

HOSTFILE="$(realpath -- "${HOSTFILE:?a hostfile, see hostfile.example}")"
STAGE="${STAGE:-stage1_dcr}" # stage1_dcr or stage2_llava
PORT="${PORT:-29500}"
REPO="${REPO:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)}"
DEEPSPEED="${DEEPSPEED:-$REPO/.venv/bin/deepspeed}"

cd "$REPO"
exec "$DEEPSPEED" --hostfile="$HOSTFILE" --master_port="$PORT" --no_local_rank --module "$STAGE" "$@"
