#!/usr/bin/env bash
# The published second fine-tuning of InternVL-Chat-V1-2 with LoRA of rank 16 on all linear layers of the language model.
# Usage:     MODEL=OpenGVLab/InternVL-Chat-V1-2-Plus DATA=meta.json OUT=out/lora scripts/internvl/finetune_v1_2_lora.sh [flags...]
# Required:  MODEL  checkpoint, folder or hub id     DATA  meta file or rows (docs/data.md)     OUT  folder to write
# Optional:  IMAGES=.  folder of the images of rows    GLOBAL_BATCH=16  samples per optimizer step
#            MICRO_BATCH=4  samples per GPU (2 GPUs x 2)
#            --config run.yaml  flags in a file; those of configs/internvl/finetune_v1_2_lora.yaml are the defaults, and
#            typed flags win. Devices and nodes: see scripts/launch.sh. All flags: python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
# Then:      scripts/merge_lora.sh --model-path M --lora-path O --save-model-path MERGED
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch "$ROOT/scripts/zero3.json" "$ROOT/configs/internvl/finetune_v1_2_lora.yaml" "$@"
