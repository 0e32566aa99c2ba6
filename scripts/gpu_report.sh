#!/usr/bin/env bash
# Measure everything that this package promises on a GPU, in one run: correctness, inference, training, serving.
# Usage:     scripts/gpu_report.sh [--minutes 30] [--only PART ...] [--output out/gpu-report] [--markdown docs/benchmarks.md]
#            scripts/gpu_report.sh --rehearsal   the same code on a CPU with small shapes, in some minutes
# Optional:  PYTHON=.venv/bin/python   CUDA_VISIBLE_DEVICES=0
# The report is written after every figure, and continued by the next run; python scripts/gpu_report.py --help lists the flags.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x $ROOT/.venv/bin/python ]] && PYTHON=$ROOT/.venv/bin/python
fi
# Scripts of this repository, whatever is installed; nothing is downloaded, and one GPU is measured.
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONUNBUFFERED=1
export CUDA_VISIBLE_DEVICES=${CUDA_VISIBLE_DEVICES-0}
exec "$PYTHON" "$ROOT/scripts/gpu_report.py" "$@"
