#!/usr/bin/env bash
# Stage 3 of Yi-VL: everything trains on conversations at 448x448.
# Usage:     MODEL=out/stage2 DATA=mixture.yaml OUT=out/stage3 scripts/train_stage3.sh [flags...]
#            scripts/train_stage3.sh --model_name_or_path M --data_path D --image_folder I --output_dir O
# Required:  MODEL  checkpoint of stage 2     DATA  conversations (docs/data.md)     OUT  folder of the trained model
# Optional:  IMAGES=.  folder of the pictures    GLOBAL_BATCH=256  rows of a step    MICRO_BATCH=2  rows on a GPU
#            devices and nodes: see scripts/launch.sh. Flags come last and win: python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
flags=(--stage 3 --gradient_checkpointing True --vision_gradient_checkpointing True)
# 256: Yi-VL model card, "Training"; the rest of the published numbers is in yivl/train/stages.py.
launch "$ROOT/scripts/zero3.json" "${GLOBAL_BATCH:-256}" "${MICRO_BATCH:-2}" "${flags[@]}" -- "$@"
