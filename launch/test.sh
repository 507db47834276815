#!/usr/bin/env bash
# Everything that must hold before a change goes in: style, types, floors, tests. Further arguments go to pytest.
#
#     bash launch/test.sh [quick] [pytest's arguments]
#
# `quick` is for the inner loop: no world of ranks, no engine, no whole run. MEGARL_TEST_WORKERS=n tests run side by side
# (default: one for each core, three at most; 0: all in one process, for a debugger).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh

quick=()
if [[ ${1:-} == quick ]]; then
    shift
    quick=(--quick)
fi

# The tests of jobs want a real Slurm. libpmix-dev: Slurm looks for PMIx under a name that only this package gives.
if [[ -z ${quick[*]} ]] && ! PATH=$PATH:/usr/sbin type -P slurmctld slurmd munged >/dev/null; then
    said=$(mktemp)
    if ((UID != 0)) || ! grep -qE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release 2>/dev/null; then
        echo "test: Slurm is not installed, and only root on Debian or Ubuntu may do it here: its tests are skipped"
    elif ! apt-get update >"$said" 2>&1 || ! DEBIAN_FRONTEND=noninteractive apt-get install -y \
        --no-install-recommends slurm-wlm munge libpmix-dev >>"$said" 2>&1; then
        echo "test: Slurm could not be installed ($(tail -n 1 "$said")): its tests are skipped"
    fi
    rm -f "$said"
fi
# The page of a run is opened in a browser; it says itself what keeps it from one.
if [[ -z ${quick[*]} ]] && ! bash launch/browser.sh >/dev/null; then
    echo "test: the test of a run's page is skipped"
fi
export PATH="$PWD/.venv/bin:$PATH"
# Tests run side by side: more threads than one each would wait for each other.
export OMP_NUM_THREADS=1

# nproc would count threads by those variables.
cores=$(env -u OMP_NUM_THREADS -u OMP_THREAD_LIMIT nproc)
workers=${MEGARL_TEST_WORKERS:-$((cores < 3 ? cores : 3))}

ruff check .
# Import contracts are a test; types are checked beside the tests.
types=$(mktemp)
pyright >"$types" 2>&1 &
checker=$!
trap 'kill "$checker" 2>/dev/null || true; rm -f "$types"' EXIT
failed=0
# Not -q: pytest's closing line, with its counts, is the last thing printed where all is well.
python -m pytest -n "$workers" --durations=15 "${quick[@]}" "$@" || failed=$?
if ! wait "$checker"; then
    cat "$types"
    failed=1
fi
exit "$failed"
