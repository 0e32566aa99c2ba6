#!/usr/bin/env bash
# CMMMU: answers, scores by subject and domain, a chart beside the published ones, a file for submission.
# Usage:     scripts/eval_cmmmu.sh --model-path M --output O [flags...]
#            MODEL=M OUT=O scripts/eval_cmmmu.sh [flags...]
# Required:  MODEL  Yi-VL checkpoint, folder or hub id     OUT  folder to write; the same command goes on after a kill
# Optional:  DATA=m-a-p/CMMMU  folder of parquet files or of save_to_disk, or hub id
#            --split test  predictions for the split whose answers are not published (default: val)
#            devices and nodes: see scripts/launch.sh; all nodes see one OUT. Every GPU holds a whole model: one that is
#            too large for that is split over all of them by python -m yivl.eval cmmmu, or fits with --load-4bit.
#            All flags: python -m yivl.eval cmmmu --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
evaluate cmmmu "$@"
