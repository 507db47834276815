#!/usr/bin/env bash
# A run under MPI; on several machines, name them by MPI's own means, such as a hostfile in MPIRUN_OPTIONS.
#
#     launch/mpirun.sh PROCESSES COMMAND CONFIG [key=value ...]
#     MPIRUN_OPTIONS="--hostfile hosts" launch/mpirun.sh 16 train configs/grpo_qwen3_30b_a3b.yaml
set -euo pipefail
if (($# < 3)); then
    sed -n '2,5s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
processes=$1
shift
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

options=(${MPIRUN_OPTIONS:-})
# Containers often have one user and no count of their cores.
((UID == 0)) && options+=(--allow-run-as-root)
exec mpirun "${options[@]}" -n "$processes" python -m megarl "$@"
