#!/usr/bin/env bash
# A run on this machine, by torchrun.
#
#     launch/local.sh PROCESSES COMMAND CONFIG [key=value ...]
#     launch/local.sh 8 train configs/grpo_qwen3_30b_a3b.yaml name=first
set -euo pipefail
if (($# < 3)); then
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
processes=$1
shift
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

exec torchrun --standalone --local-addr 127.0.0.1 --nproc-per-node "$processes" -m megarl "$@"
