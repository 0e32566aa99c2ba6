#!/usr/bin/env bash
# Stage 1 of Yi-VL: train the ViT and a new projector for a language model on captions at 224x224.
# Usage:     MODEL=01-ai/Yi-6B-Chat VIT=laion/CLIP-ViT-H-14-laion2B-s32B-b79K DATA='shards/{00000..00099}.tar' \
#              OUT=out/stage1 scripts/train_stage1.sh [flags...]
#            scripts/train_stage1.sh --model_name_or_path M --vision_tower V --data_path D --image_folder I --output_dir O
# Required:  MODEL  Yi language model, folder or hub id     VIT  ViT folder, hub id, or open_clip:MODEL/TAG
#            DATA  captions or rows (docs/data.md)          OUT  folder of the trained model
# Optional:  IMAGES=.  folder of the images    GLOBAL_BATCH=4096  samples per optimizer step    MICRO_BATCH=32  samples per GPU
#            devices and nodes: see scripts/launch.sh. Flags come last and win; see python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
# The published settings, the global batch size too, are in yivl/train/stages.py.
launch "$ROOT/scripts/zero2.json" "{stage: 1, per_device_train_batch_size: 32, gradient_checkpointing: true, vision_gradient_checkpointing: true}" "$@"
