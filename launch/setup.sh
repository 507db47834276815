#!/usr/bin/env bash
# Makes .venv beside this repository's files from a pinned lock, and installs megarl into it. Repeatable: a second
# call only compares a stamp.
#
#   MEGARL_LOCK=cpu|gpu   which lock; default: gpu where nvidia-smi lists one, else cpu
#   PYTHON=...            the Python to build on (3.11 to 3.13)
#   PIP_INDEX_URL, PIP_EXTRA_INDEX_URL, PIP_FIND_LINKS, PIP_NO_INDEX, PIP_CERT, PIP_DEFAULT_TIMEOUT   are honoured
#
# The GPU lock needs neither a GPU nor a CUDA toolkit: a login node sets it up for the others. launch/extension.sh has what
# it compiles, and where that is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/extension.sh

if [[ -z "${MEGARL_LOCK:-}" ]]; then
    if nvidia-smi -L 2>/dev/null | grep -q GPU; then MEGARL_LOCK=gpu; else MEGARL_LOCK=cpu; fi
fi
lock="requirements/$MEGARL_LOCK.lock"
[[ -f "$lock" ]] || { echo "setup: MEGARL_LOCK=$MEGARL_LOCK must be cpu or gpu" >&2; exit 2; }

stamp=.venv/megarl.stamp
# The checkout's place belongs to the stamp: a virtual environment does not survive being moved.
wanted="$MEGARL_LOCK $(cat "$lock" setup.py | sha256sum | cut -d' ' -f1) $PWD"
if [[ -x .venv/bin/megarl && "$(cat "$stamp" 2>/dev/null)" == "$wanted" ]]; then
    exit 0
fi

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$candidate" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "setup: needs Python 3.11, 3.12 or 3.13 (the lock's packages have no others); set PYTHON to one" >&2
    exit 2
}

# A half-made environment, one that was moved, or one of the other lock is not worth repairing.
read -r old_kind _ old_place 2>/dev/null <"$stamp" || true
if [[ -d .venv && ("${old_kind:-$MEGARL_LOCK}" != "$MEGARL_LOCK" || "${old_place:-$PWD}" != "$PWD") ]] ||
    ! .venv/bin/python -c '' 2>/dev/null; then
    rm -rf .venv
    python="$(find_python)"
    echo "setup: making .venv with $("$python" --version)"
    "$python" -m venv .venv || {
        echo "setup: '$python -m venv' failed; on Debian and Ubuntu install the package python3-venv" >&2
        exit 1
    }
fi
rm -f "$stamp"

# uv speaks of the same places under other names.
[[ -z "${PIP_INDEX_URL:-}" ]] || export UV_DEFAULT_INDEX="${UV_DEFAULT_INDEX:-$PIP_INDEX_URL}"
[[ -z "${PIP_EXTRA_INDEX_URL:-}" ]] || export UV_EXTRA_INDEX_URL="${UV_EXTRA_INDEX_URL:-$PIP_EXTRA_INDEX_URL}"
[[ -z "${PIP_FIND_LINKS:-}" ]] || export UV_FIND_LINKS="${UV_FIND_LINKS:-$(echo $PIP_FIND_LINKS | tr ' ' ',')}"
[[ -z "${PIP_CERT:-}" ]] || export SSL_CERT_FILE="${SSL_CERT_FILE:-$PIP_CERT}"
[[ -z "${PIP_DEFAULT_TIMEOUT:-}" ]] || export UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-$PIP_DEFAULT_TIMEOUT}"
# Versions are exact, so the index that has one may serve it: PyTorch's index also lists old copies of other packages.
export UV_INDEX_STRATEGY=unsafe-best-match UV_PYTHON_DOWNLOADS=never UV_NO_PROGRESS="${UV_NO_PROGRESS:-1}"

# An environment that uv made has no pip.
.venv/bin/python -m pip --version >/dev/null 2>&1 || .venv/bin/python -m ensurepip >/dev/null
install_by_pip() { .venv/bin/python -m pip install --quiet --no-deps "$@"; }

uv="$(command -v uv || true)"
if [[ -z "$uv" ]]; then
    uv=.venv/bin/uv
    [[ -x "$uv" ]] || install_by_pip --no-compile "$(grep '^uv==' "$lock")"
fi

# For no index uv has no variable.
install() { "$uv" pip install --quiet ${PIP_NO_INDEX:+--no-index} --python .venv/bin/python --no-deps "$@"; }
# Has wheels for Python 3.11 and says that it needs 3.12: pip can be told to take it all the same, uv cannot.
megatron=megatron-core

extension="$(locked "$lock" $EXTENSION)"
if [[ -n "$extension" ]]; then
    kept="$(extension_folder "$lock" "$(python_kind .venv/bin/python)")"
    # Said now, not after gigabytes.
    wheel_in "$kept" >/dev/null || can_compile .venv/bin/python || exit 1
fi

echo "setup: installing $(grep -c '==' "$lock") packages of $lock"
start=$SECONDS
# Compiled at once and by all cores: importing torch, Megatron and vLLM costs a third less from the first run on.
grep -v -E "^($EXTENSION|$megatron)==" "$lock" >.venv/first.lock
install --compile-bytecode -r .venv/first.lock || {
    cat >&2 <<'HELP'
setup: installation failed (the reason is above). If it is torch==...+cpu that was not found: the package index does not
carry PyTorch's CPU build. Set PIP_EXTRA_INDEX_URL to PyTorch's CPU wheel index, or PIP_FIND_LINKS to a folder that
holds the wheel, and run this again.
HELP
    exit 1
}
install_by_pip --ignore-requires-python "$megatron==$(locked "$lock" $megatron)"
if [[ -n "$extension" ]]; then
    if ! wheel_in "$kept" >/dev/null; then
        echo "setup: compiling $EXTENSION $extension (half an hour of two cores; kept in $kept)"
        compile_extension .venv "$extension" "$kept"
    fi
    install --compile-bytecode "$(wheel_in "$kept")"
fi
install --no-build-isolation --editable .
rm -f .venv/first.lock
echo "$wanted" >"$stamp"
echo "setup: done in $((SECONDS - start)) s"
