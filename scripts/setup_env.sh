# Sourced by demo.sh and test.sh: makes .venv (PYTHON picks the interpreter), installs
# requirements.txt into it when that file changed, and puts it first on PATH.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -m venv .venv
fi
if ! cmp -s requirements.txt .venv/requirements.installed; then
    .venv/bin/python -m pip install --quiet -r requirements.txt
    cp requirements.txt .venv/requirements.installed
fi
export PATH="$PWD/.venv/bin:$PATH"
