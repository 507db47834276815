#!/usr/bin/env bash
# From nothing to a policy that learned by GRPO, on a machine without a GPU: sets up, makes the inputs, warms up a tiny
# model by supervised training, then trains it by reinforcement.
#
#     bash launch/quickstart.sh [moe|fp8] [key=value ...]
#
# `moe` takes a mixture of experts, spread over two processes, for the dense model; `fp8` a policy and engines in FP8, of a
# larger one; key=value go to the reinforcement run.
# What is finished already is not done again; `rm -r data/quickstart* runs/quickstart*` starts afresh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

name=quickstart
model=(--family qwen2 --ffn 384 --hidden 128 --kv-heads 2)
warmup=()
case ${1:-} in
    moe)
        model=(--family qwen3_moe --ffn 128 --hidden 128 --kv-heads 2 --experts 8 --experts-per-token 2)
        warmup=(parallel.expert=2 moe.aux_loss_coefficient=0.001)
        ;;
    fp8)
        model=(--family qwen2 --ffn 512 --hidden 256 --kv-heads 4)
        ;;
esac
if [[ ${1:-} == moe || ${1:-} == fp8 ]]; then
    name=quickstart_$1
    shift
fi
inputs=data/$name

bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

if [[ ! -f $inputs/complete ]]; then
    rm -rf $inputs
    python tools/make_arithmetic.py --out $inputs/arithmetic --train 20000 --heldout 256 --levels 2 3
    python tools/train_tokenizer.py --input $inputs/arithmetic/train.jsonl --vocab-size 320 --out $inputs/tokenizer
    python tools/make_tiny_model.py --out $inputs/model "${model[@]}" --layers 4 --heads 4 \
        --vocab-size 320 --tied --tokenizer $inputs/tokenizer
    touch $inputs/complete
fi

if [[ ! -f runs/${name}_warmup/summary.json ]]; then
    megarl train configs/quickstart_warmup.yaml name=${name}_warmup model.path=$inputs/model \
        data.path=$inputs/arithmetic/train.jsonl "${warmup[@]}"
fi
# The last run is kept beside the new one.
if [[ -d runs/$name ]]; then
    rm -rf runs/$name.previous
    mv runs/$name runs/$name.previous
fi
megarl train configs/$name.yaml "$@"
