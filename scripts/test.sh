#!/usr/bin/env bash
# Lint, format check and the tests. Arguments go to pytest; `-m slow` runs the slow tests.
set -euo pipefail
source "$(dirname "$0")/setup_env.sh" requirements-dev.txt
ruff check .
ruff format --check .
if [ $# -eq 0 ]; then
    set -- -m "not slow"
fi
# A process per core; the tests of a file share its trainings, so they stay together. With more
# threads each, the processes would wait for one another.
export OMP_NUM_THREADS=1
python -m pytest -n auto --dist loadfile --durations=15 "$@"
