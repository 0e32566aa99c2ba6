#!/usr/bin/env bash
# Stage 3 of Yi-VL: train all parameters on conversations at 448x448.
# Usage:     MODEL=out/stage2 DATA=mixture.yaml OUT=out/stage3 scripts/train_stage3.sh [flags...]
#            scripts/train_stage3.sh --model_name_or_path M --data_path D --image_folder I --output_dir O
# Required:  MODEL  checkpoint of stage 2     DATA  conversations (docs/data.md)     OUT  folder of the trained model
# Optional:  IMAGES=.  folder of the images    GLOBAL_BATCH=256  samples per optimizer step    MICRO_BATCH=2  samples per GPU
#            devices and nodes: see scripts/launch.sh. Flags come last and win; see python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
# The published settings, the global batch size too, are in yivl/train/stages.py.
launch "$ROOT/scripts/zero3.json" "{stage: 3, per_device_train_batch_size: 2, gradient_checkpointing: true, vision_gradient_checkpointing: true}" "$@"
