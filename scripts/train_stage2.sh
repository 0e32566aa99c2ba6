#!/usr/bin/env bash
# Stage 2 of Yi-VL: train the ViT and the projector of stage 1 at 448x448; position embeddings are interpolated.
# Usage:     MODEL=out/stage1 DATA=mixture.yaml OUT=out/stage2 scripts/train_stage2.sh [flags...]
#            scripts/train_stage2.sh --model_name_or_path M --data_path D --image_folder I --output_dir O
# Required:  MODEL  checkpoint of stage 1     DATA  captions or rows (docs/data.md)     OUT  folder of the trained model
# Optional:  IMAGES=.  folder of the images    GLOBAL_BATCH=4096  samples per optimizer step    MICRO_BATCH=8  samples per GPU
#            devices and nodes: see scripts/launch.sh. Flags come last and win; see python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
# The published settings, the global batch size too, are in yivl/train/stages.py.
launch "$ROOT/scripts/zero2.json" "{stage: 2, per_device_train_batch_size: 8, gradient_checkpointing: true, vision_gradient_checkpointing: true}" "$@"
