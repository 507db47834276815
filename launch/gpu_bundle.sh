#!/usr/bin/env bash
# Makes what launch/gpu_check.sh installs on a machine without a network: every wheel of the GPU lock and the compiled
# extension, for the Python of this checkout's .venv, in parts of at most 60 MiB. Needs a network and no GPU.
#
#   bash launch/gpu_bundle.sh DIR    in a checkout of its own: .venv becomes one of the GPU lock
set -euo pipefail
[[ $# == 1 ]] || { echo "usage: launch/gpu_bundle.sh DIR" >&2; exit 2; }
mkdir -p "$1"
out="$(cd "$1" && pwd)"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/extension.sh

lock=requirements/gpu.lock
if [[ -f .venv/megarl.stamp && "$(cut -d' ' -f1 .venv/megarl.stamp)" != gpu ]]; then
    echo "gpu_bundle: .venv is of another lock, and would be replaced: run this in a checkout of its own" >&2
    exit 2
fi
MEGARL_LOCK=gpu bash launch/setup.sh

work="$(mktemp -d "$out/work.XXXXXX")"
trap 'rm -rf "$work"' EXIT
kept="$(extension_folder "$lock" "$(python_kind .venv/bin/python)")"
mkdir -p "$work/cache/wheels"
cp -r "$kept" "$work/cache/wheels/"
# It says that it needs Python 3.12, and only `download` passes over that.
megatron=megatron-core
pip() { .venv/bin/python -m pip "$@"; }
pip download --quiet --no-deps --ignore-requires-python --dest "$work/wheels" "$megatron==$(locked "$lock" $megatron)"
# What is published as source alone becomes a wheel here.
grep -v -E "^($EXTENSION|$megatron)==" "$lock" >"$work/lock"
pip wheel --quiet --no-deps --wheel-dir "$work/wheels" -r "$work/lock"

rm -f "$out"/bundle.*
python_kind .venv/bin/python >"$out/bundle.python"
tar -C "$work" -cf - wheels cache | split -b 60M -d -a 3 - "$out/bundle.tar."
(cd "$out" && sha256sum bundle.tar.* >bundle.sha256)
echo "gpu_bundle: $(find "$out" -name 'bundle.tar.*' | wc -l) parts, $(du -sh "$out" --exclude=work.* | cut -f1), in $out"
