#!/usr/bin/env bash
# A run on several machines that SSH reaches without a password: one torchrun on each, one process a GPU.
#   HOSTS="node1 node2" bash scripts/cluster/torchrun_ssh.sh CONFIG [key=value ...]
# Checkout, environment, weights, data and runs lie on a disk that all of them see, under the same paths. TERM or Ctrl-C
# here stops all machines after their running step, with everything saved; the same command goes on.
set -euo pipefail

HOSTS="${HOSTS:?names of the machines, separated by spaces; the first one holds the rendezvous}"
STAGE="${STAGE:-stage1_dcr}"                # stage1_dcr or stage2_llava
NPROC="${NPROC:-8}"                         # processes a machine
PORT="${PORT:-29500}"
MAX_RESTARTS="${MAX_RESTARTS:-3}"           # after a process has died, from the last checkpoint
REPO="${REPO:-$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.." && pwd -P)}"
PYTHON="${PYTHON:-$REPO/.venv/bin/python}"
ENVIRONMENT="${ENVIRONMENT:-HF_HUB_OFFLINE=1}" # NAME=value ..., for every machine
SSH="${SSH:-ssh -o BatchMode=yes}"

read -r -a hosts <<<"$HOSTS"
read -r -a ssh <<<"$SSH"
read -r -a environment <<<"$ENVIRONMENT"
id="dcr-mllm-$$-$(date +%s)"
pids="\${TMPDIR:-/tmp}/$id.pid" # on each machine: of its torchrun

command=(env "${environment[@]}" "$PYTHON" -m dcr_mllm.torchrun
    --nnodes="${#hosts[@]}" --nproc-per-node="$NPROC" --max-restarts="$MAX_RESTARTS"
    --rdzv-backend=c10d --rdzv-id="$id" --rdzv-endpoint="${hosts[0]}:$PORT"
    -m "$STAGE" "$@")
# Quoted once more, because the remote shell takes it apart again.
remote="cd $(printf '%q' "$REPO") && echo \$\$ > $pids && exec $(printf '%q ' "${command[@]}")"

on_all() {
    local host
    for host in "${hosts[@]}"; do "${ssh[@]}" "$host" "$1" </dev/null || true; done
}
told=0
# shellcheck disable=SC2317 # called by the trap
stop() {
    told=$((told + 1))
    on_all "kill -TERM \$(cat $pids)"
}
trap stop TERM INT

# In the background of a script SIGINT is ignored, so Ctrl-C reaches the machines through the trap alone.
steps=()
for host in "${hosts[@]}"; do
    "${ssh[@]}" "$host" "$remote" </dev/null &
    steps+=($!)
done
failed=0
for step in "${steps[@]}"; do
    before=-1
    while [ "$before" -ne "$told" ]; do # a trap ends `wait` before its time
        before=$told
        status=0
        wait "$step" || status=$?
    done
    [ "$status" -eq 0 ] || failed=$status
done
on_all "rm -f $pids"
exit "$failed"
