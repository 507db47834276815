#!/usr/bin/env bash
# The quickstart with a mixture of experts: makes the inputs, warms a tiny Qwen3-MoE up by supervised training, then
# trains it by reinforcement with its experts on two processes. Arguments (key=value) go to the reinforcement run.
# What is finished already is not done again; `rm -r data/quickstart_moe runs/quickstart_moe*` starts afresh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

inputs=data/quickstart_moe
if [[ ! -f $inputs/complete ]]; then
    rm -rf $inputs
    python tools/make_arithmetic.py --out $inputs/arithmetic --train 20000 --heldout 256 --levels 2 3
    python tools/train_tokenizer.py --input $inputs/arithmetic/train.jsonl --vocab-size 320 --out $inputs/tokenizer
    python tools/make_tiny_model.py --out $inputs/model --family qwen3_moe --hidden 128 --layers 4 --heads 4 \
        --kv-heads 2 --ffn 128 --experts 8 --experts-per-token 2 --vocab-size 320 --tied --tokenizer $inputs/tokenizer
    touch $inputs/complete
fi

if [[ ! -f runs/quickstart_moe_warmup/summary.json ]]; then
    megarl train configs/quickstart_warmup.yaml name=quickstart_moe_warmup model.path=$inputs/model \
        data.path=$inputs/arithmetic/train.jsonl parallel.expert=2 moe.aux_loss_coefficient=0.001
fi
# The last run is kept beside the new one.
if [[ -d runs/quickstart_moe ]]; then
    rm -rf runs/quickstart_moe.previous
    mv runs/quickstart_moe runs/quickstart_moe.previous
fi
megarl train configs/quickstart_moe.yaml "$@"
