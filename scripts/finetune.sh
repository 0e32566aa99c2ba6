#!/usr/bin/env bash
# Full fine-tuning of the language model of Yi-VL; ViT and projector are frozen.
# Usage:     scripts/finetune.sh --model_name_or_path M --data_path D --image_folder I --output_dir O [flags...]
#            MODEL=M DATA=D IMAGES=I OUT=O scripts/finetune.sh [flags...]
# Required:  MODEL  Yi-VL checkpoint, folder or hub id     DATA  conversations (docs/data.md)     OUT  folder to write
# Optional:  IMAGES=.  folder of the images    MICRO_BATCH=1  samples per GPU
#            GLOBAL_BATCH=2 x MICRO_BATCH x processes  samples per optimizer step
#            --config run.yaml  flags in a file; those of configs/finetune.yaml are the defaults, and typed flags win
#            devices and nodes: see scripts/launch.sh. Flags such as --freeze_mm_mlp_adapter False train the
#            projector too, --unfreeze_mm_vision_tower True the ViT. All flags: python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$ROOT/scripts/zero3.json" "$ROOT/configs/finetune.yaml" "$@"
