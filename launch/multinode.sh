#!/usr/bin/env bash
# A run on several machines without a scheduler, by torchrun: start the same line on each of them, within a few minutes.
#
#     launch/multinode.sh HOST,HOST,... PROCESSES_PER_HOST COMMAND CONFIG [key=value ...]
#     launch/multinode.sh gpu01,gpu02 8 train configs/grpo_qwen3_30b_a3b.yaml
#
# Processes meet at the first host, port MASTER_PORT (29500). A machine finds its place by its host name; NODE_RANK=n says
# it where that is not the name in the list.
set -euo pipefail
if (($# < 4)); then
    sed -n '2,8s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
IFS=, read -ra hosts <<<"$1"
processes=$2
shift 2
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

if [[ -z ${NODE_RANK:-} ]]; then
    for place in "${!hosts[@]}"; do
        # With or without the domain, on either side.
        [[ ${hosts[place]%%.*} == "$(hostname -s)" ]] && NODE_RANK=$place
    done
fi
if [[ -z ${NODE_RANK:-} ]]; then
    echo "megarl: host $(hostname): must be among ${hosts[*]}. Fix: name it in the list, or set NODE_RANK." >&2
    exit 2
fi

exec torchrun --nnodes "${#hosts[@]}" --node-rank "$NODE_RANK" --nproc-per-node "$processes" \
    --master-addr "${hosts[0]}" --master-port "${MASTER_PORT:-29500}" -m megarl "$@"
