# Sourced with a requirements file: makes .venv (PYTHON selects the interpreter), installs the file
# into it if it has changed since, and puts it first on PATH.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
if [ ! -x .venv/bin/python ]; then
    "${PYTHON:-python3}" -c 'import sys; sys.exit(sys.version_info < (3, 11) and
        "Python 3.11 or later is needed; select it with PYTHON=python3.11")'
    "${PYTHON:-python3}" -m venv .venv
fi
# requirements-dev.txt includes the others.
if ! cat requirements*.txt constraints.txt | cmp -s - ".venv/$1.installed"; then
    .venv/bin/python -m pip install --quiet -r "$1" -c constraints.txt
    cat requirements*.txt constraints.txt > ".venv/$1.installed"
fi
export PATH="$PWD/.venv/bin:$PATH"
