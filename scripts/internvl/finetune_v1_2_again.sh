#!/usr/bin/env bash
# The published second fine-tuning of InternVL-Chat-V1-2 on other data: language model and projector; the ViT is frozen.
# Usage:     MODEL=OpenGVLab/InternVL-Chat-V1-2-Plus DATA=meta.json OUT=out/again scripts/internvl/finetune_v1_2_again.sh [flags...]
# Required:  MODEL  checkpoint, folder or hub id     DATA  meta file or rows (docs/data.md)     OUT  folder to write
# Optional:  IMAGES=.  folder of the images of rows    GLOBAL_BATCH=128  samples per optimizer step
#            MICRO_BATCH=4  samples per GPU (16 GPUs x 2)
#            --config run.yaml  flags in a file; those of configs/internvl/finetune_v1_2_again.yaml are the defaults, and
#            typed flags win. Devices and nodes: see scripts/launch.sh. All flags: python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch "$ROOT/scripts/zero3.json" "$ROOT/configs/internvl/finetune_v1_2_again.yaml" "$@"
