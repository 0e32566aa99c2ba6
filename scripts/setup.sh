#!/usr/bin/env bash
# Set up a virtual environment with everything yivl needs.
# Usage:     scripts/setup.sh [dev]       dev adds what the tests and the linters need
# Optional:  VENV=.venv  folder of the environment    PYTHON=python3  interpreter, 3.11 or newer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv} PYTHON=${PYTHON:-python3}
case ${1:-} in
  "") target=. ;;
  dev) target=".[dev]" ;;
  *) echo "error: unknown argument $1; expected nothing or 'dev'" >&2; exit 2 ;;
esac
"$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
  echo "error: $PYTHON is older than 3.11; set PYTHON to a newer interpreter" >&2; exit 2
}
[[ -x $VENV/bin/python ]] || "$PYTHON" -m venv "$VENV"
echo "installing into $VENV; with PyTorch this takes a few minutes" >&2
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target"
