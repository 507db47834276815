#!/usr/bin/env bash
# From nothing to a policy that learned by GRPO, on a machine without a GPU: sets up, makes the inputs, warms up a tiny
# model by supervised training, then trains it by reinforcement. Arguments (key=value) go to the reinforcement run.
# What is finished already is not done again; `rm -r data/quickstart runs/quickstart*` starts afresh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

inputs=data/quickstart
if [[ ! -f $inputs/complete ]]; then
    rm -rf $inputs
    python tools/make_arithmetic.py --out $inputs/arithmetic --train 20000 --heldout 256 --levels 2 3
    python tools/train_tokenizer.py --input $inputs/arithmetic/train.jsonl --vocab-size 320 --out $inputs/tokenizer
    python tools/make_tiny_model.py --out $inputs/model --family qwen2 --hidden 128 --layers 4 --heads 4 --kv-heads 2 \
        --ffn 384 --vocab-size 320 --tied --tokenizer $inputs/tokenizer
    touch $inputs/complete
fi

if [[ ! -f runs/quickstart_warmup/summary.json ]]; then
    megarl train configs/quickstart_warmup.yaml
fi
# The last run is kept beside the new one.
if [[ -d runs/quickstart ]]; then
    rm -rf runs/quickstart.previous
    mv runs/quickstart runs/quickstart.previous
fi
megarl train configs/quickstart.yaml "$@"

echo
echo "Accuracy before and after:  runs/quickstart/summary.json"
echo "Learning curves:            runs/quickstart/curves.png"
echo "Answers, step by step:      runs/quickstart/samples.jsonl"
