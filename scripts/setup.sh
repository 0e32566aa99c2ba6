#!/usr/bin/env bash
# Set up a virtual environment for yivl.
# Usage:     scripts/setup.sh [EXTRA...]   none: what a question needs; train, quantization, serve, export: see
#                                          requirements.txt; all: all of these; dev: all, test tools and llama.cpp
# Needs:     Python 3.11 or newer with venv, 6 GB of disk; a C++ compiler (g++) for training and torch.compile
# Optional:  VENV=.venv  folder of the environment    PYTHON=python3  interpreter, 3.11 or newer
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=${VENV:-.venv} PYTHON=${PYTHON:-python3}
fail() { echo "error: $1" >&2; exit 2; }
is_new_enough() { "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; }
install() { "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "$@"; }
for extra in "$@"; do
  case $extra in
    train | quantization | serve | export | all | dev) ;;
    *) fail "unknown extra $extra; expected train, quantization, serve, export, all or dev" ;;
  esac
done
if ! "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
  command -v "$PYTHON" >/dev/null || fail "there is no $PYTHON; set PYTHON to an interpreter, 3.11 or newer"
  is_new_enough "$PYTHON" || fail "$PYTHON is older than 3.11; set PYTHON to a newer interpreter"
  "$PYTHON" -m venv "$VENV" || fail "$PYTHON cannot create $VENV; on Debian and Ubuntu, install python3-venv"
fi
is_new_enough "$VENV/bin/python" || fail "$VENV is older than Python 3.11; remove it and run this again"
echo "installing into $VENV; with PyTorch this takes a few minutes" >&2
extras=$(IFS=,; echo "$*")
install --editable ".${extras:+[$extras]}"
if [[ " $* " == *" dev "* ]] && ! "$VENV/bin/python" -c 'from llama_cpp import mtmd_cpp' 2>/dev/null; then
  # Not from pip's cache: a wheel that was built with other settings may lack image support. And not with all of its
  # programs at full speed: that takes minutes longer.
  export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc 2>/dev/null || echo 2)}
  export CMAKE_ARGS=${CMAKE_ARGS:-"-DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 -DCMAKE_C_FLAGS_RELEASE=-O2
    -DGGML_NATIVE=OFF -DGGML_LLAMAFILE=OFF -DGGML_CPU_REPACK=OFF -DGGML_OPENMP=OFF -DLLAMA_BUILD_TESTS=OFF
    -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_TOOLS=OFF -DLLAMA_BUILD_SERVER=OFF -DLLAMA_OPENSSL=OFF -DMTMD_VIDEO=OFF
    -DCMAKE_PROJECT_llama_cpp_INCLUDE='$PWD/scripts/llama_cpp.cmake'"}
  "$VENV/bin/python" -m pip uninstall --quiet --yes llama-cpp-python 2>/dev/null || true
  install --no-cache-dir --editable '.[llama-cpp]'
fi
