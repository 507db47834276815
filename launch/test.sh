#!/usr/bin/env bash
# Everything that must hold before a change goes in: style, types, floors, tests. Further arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash launch/setup.sh
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
pyright
lint-imports
# Not exec'd with -q: pytest's closing line, with its counts, is the last thing printed.
python -m pytest --durations=15 "$@"
