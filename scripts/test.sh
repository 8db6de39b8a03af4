#!/usr/bin/env bash
# Lint, format check and the tests. Arguments go to pytest; `-m slow` runs the slow tests.
set -euo pipefail
source "$(dirname "$0")/setup_env.sh" requirements-dev.txt
ruff check .
ruff format --check .
if [ $# -eq 0 ]; then
    # A process per core; the tests of a file share its trainings, so they stay together. The slow
    # proofs run one by one: they start processes of their own, and some watch the clock.
    set -- -m "not slow" -n auto --dist loadfile
fi
python -m pytest --durations=15 "$@"
