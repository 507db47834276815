#!/usr/bin/env bash
# All that only a GPU can say, in ten minutes, on a machine with one and no network: installs what launch/gpu_bundle.sh
# made elsewhere, then tests, benchmarks and memory. Each part has a limit of its own, and one that fails stops no other.
# Ends with a table. Results and logs: runs/gpu_check/.
#
#   bash launch/gpu_check.sh [BUNDLE]    BUNDLE: the folder with all parts; without it .venv is taken as it is
#
#   MEGARL_GPU_PARTS="tests push"   these parts alone
set -uo pipefail
bundle="$(cd "${1:-/nonexistent}" 2>/dev/null && pwd)"
if [[ -n "${1:-}" && -z "$bundle" ]]; then
    echo "gpu_check: $1 is no folder" >&2
    exit 2
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/gpu_parts.sh
export MEGARL_GPU_RESULTS="$PWD/runs/gpu_check"
# What chosen parts find is put beside what others have found before.
[[ -n "${MEGARL_GPU_PARTS:-}" ]] || rm -rf "$MEGARL_GPU_RESULTS"
mkdir -p "$MEGARL_GPU_RESULTS"

# Seconds, killing included, add up to less than ten minutes.
[[ -z "$bundle" ]] || part install 140 install_bundle "$bundle"
# Of the environment that is there by now.
source launch/environment.sh
gpu_part inputs 20 python tools/make_gpu_inputs.py --out data/gpu
gpu_part rates 20 python -m pytest -q tests/gpu/test_gpu_rates.py
gpu_part tests 130 python -m pytest -q tests/gpu --ignore tests/gpu/test_gpu_rates.py --ignore tests/gpu/test_gpu_memory.py
gpu_part step_bf16 60 megarl bench step configs/bench_gpu_step.yaml --json
gpu_part step_fp8 60 megarl bench step configs/bench_gpu_step.yaml precision=fp8-blockwise --json
gpu_part push 70 megarl bench reshard configs/bench_gpu_push.yaml --json
gpu_part memory 80 python -m pytest -q tests/gpu/test_gpu_memory.py
python3 tools/gpu_table.py "$MEGARL_GPU_RESULTS" | tee "$MEGARL_GPU_RESULTS/table.md"
