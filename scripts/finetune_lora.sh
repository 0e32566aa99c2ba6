#!/usr/bin/env bash
# Fine-tune Yi-VL with LoRA adapters of rank 8 on all linear layers of the language model; all weights are frozen.
# Usage:     scripts/finetune_lora.sh --model_name_or_path M --data_path D --image_folder I --output_dir O [flags...]
#            MODEL=M DATA=D IMAGES=I OUT=O scripts/finetune_lora.sh [flags...]
# Required:  MODEL  Yi-VL checkpoint, folder or hub id     DATA  conversations (docs/data.md)     OUT  folder to write
# Optional:  IMAGES=.  folder of the images    MICRO_BATCH=1  samples per GPU
#            GLOBAL_BATCH=8 x MICRO_BATCH x processes  samples per optimizer step
#            --config run.yaml  flags in a file; those of configs/finetune_lora.yaml are the defaults, and typed flags win
#            devices and nodes: see scripts/launch.sh. Flags such as --lora_r 64, --lora_vision_tower True, and
#            --freeze_mm_mlp_adapter False to train the projector too. All flags: python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
# Then:      scripts/merge_lora.sh --model-path M --lora-path O --save-model-path MERGED
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
launch "$ROOT/scripts/zero2.json" "$ROOT/configs/finetune_lora.yaml" "$@"
