#!/usr/bin/env bash
# Lint, format check and the tests. Arguments go to pytest; `-m slow` runs the longer proofs.
set -euo pipefail
source "$(dirname "$0")/setup_env.sh"
ruff check .
ruff format --check .
if [ $# -eq 0 ]; then
    set -- -m "not slow"
fi
python -m pytest "$@"
