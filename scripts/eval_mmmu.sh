#!/usr/bin/env bash
# MMMU: responses, scores by subject and domain, a chart with the published scores, a file for submission.
# Usage:     scripts/eval_mmmu.sh --model-path M --output O [flags...]
#            MODEL=M OUT=O scripts/eval_mmmu.sh [flags...]
# Required:  MODEL  checkpoint, folder or hub id     OUT  folder to write to; the same command resumes a run
# Optional:  DATA=MMMU/MMMU  folder of parquet files or of save_to_disk, or hub id
#            --split test  predictions for the split whose answers are not published (default: validation)
#            --protocol official  prompts of MMMU's example program
#            devices and nodes: see scripts/launch.sh; nodes share OUT. Every GPU holds a model copy; a model that is
#            too large is split over all GPUs by python -m yivl.eval mmmu, or fits with --load-4bit.
#            All flags: python -m yivl.eval mmmu --help.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
evaluate mmmu "$@"
