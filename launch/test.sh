#!/usr/bin/env bash
# Everything that must hold before a change goes in: style, types, floors, tests. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh

# The tests of jobs want a real Slurm. libpmix-dev: Slurm looks for PMIx under a name that only this package gives.
if ! PATH=$PATH:/usr/sbin type -P slurmctld slurmd munged >/dev/null; then
    said=$(mktemp)
    if ((UID != 0)) || ! grep -qE '^ID(_LIKE)?=.*(debian|ubuntu)' /etc/os-release 2>/dev/null; then
        echo "test: Slurm is not installed, and only root on Debian or Ubuntu may do it here: its tests are skipped"
    elif ! apt-get update >"$said" 2>&1 || ! DEBIAN_FRONTEND=noninteractive apt-get install -y \
        --no-install-recommends slurm-wlm munge libpmix-dev >>"$said" 2>&1; then
        echo "test: Slurm could not be installed ($(tail -n 1 "$said")): its tests are skipped"
    fi
    rm -f "$said"
fi
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
pyright
lint-imports
# Not exec'd with -q: pytest's closing line, with its counts, is the last thing printed.
python -m pytest --durations=15 "$@"
