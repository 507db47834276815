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

# By their whole names: on another host they are not on the path.
mpirun=$(command -v mpirun) && python=$(command -v python) || {
    echo "megarl: mpirun and python: must be on the path. Fix: install an MPI, and run launch/setup.sh." >&2
    exit 2
}
options=(${MPIRUN_OPTIONS:-})
if [[ $("$mpirun" --version) == *"Open MPI"* ]]; then
    # It hands its environment only to processes of its own host.
    for name in $(compgen -e | grep -E '^(OMP_NUM_THREADS|PYTHONPATH|(NCCL|GLOO|HF|VLLM)_.*)$'); do
        options+=(-x "$name")
    done
    # Containers often have one user.
    ((UID != 0)) || options+=(--allow-run-as-root)
fi
exec "$mpirun" "${options[@]}" -n "$processes" "$python" -m megarl "$@"
