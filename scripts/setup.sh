#!/usr/bin/env bash
# Set up a virtual environment with everything yivl needs.
# Usage:     scripts/setup.sh [dev]       dev adds what the tests and the linters need
# Needs:     Python 3.11 or newer with venv, 6 GB of disk; a C++ compiler (g++) for training and torch.compile
# Optional:  VENV=.venv  folder of the environment    PYTHON=python3  interpreter, 3.11 or newer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv} PYTHON=${PYTHON:-python3}
case ${1:-} in
  "") target=. ;;
  dev) target=".[dev]" ;;
  *) echo "error: unknown argument $1; expected nothing or 'dev'" >&2; exit 2 ;;
esac
fail() { echo "error: $1" >&2; exit 2; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON; set PYTHON to an interpreter, 3.11 or newer"
  is_new_enough "$PYTHON" || fail "$PYTHON is older than 3.11; set PYTHON to a newer interpreter"
  "$PYTHON" -m venv "$VENV" || fail "$PYTHON cannot make $VENV; on Debian and Ubuntu, install python3-venv"
fi
is_new_enough "$VENV/bin/python" || fail "$VENV is older than Python 3.11; remove it and run this again"
echo "installing into $VENV; with PyTorch this takes a few minutes" >&2
"$VENV/bin/python" -m pip install --quiet --disable-pip-version-check --editable "$target"
