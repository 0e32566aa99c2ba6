#!/usr/bin/env bash
# The published fine-tuning of InternVL-Chat-V1-2: train all parameters on 1.27 million conversations at 448x448.
# Usage:     MODEL=NousResearch/Nous-Hermes-2-Yi-34B VIT=OpenGVLab/InternViT-6B-448px-V1-2 PROJECTOR=hermes_2_yi_34b.pth \
#              DATA=configs/internvl/data_v1_2.json OUT=out/internvl scripts/internvl/finetune_v1_2.sh [flags...]
#            MODEL=CHECKPOINT DATA=D OUT=O scripts/internvl/finetune_v1_2.sh [flags...]
# Required:  MODEL  LLM of the parts, or an InternVL-Chat-V1-2 checkpoint     DATA  meta file or rows (docs/data.md)
#            OUT  folder of the trained model; for parts also VIT  InternViT, and PROJECTOR  weights of the projector
# Optional:  GLOBAL_BATCH=512  samples per optimizer step    MICRO_BATCH=8  samples per GPU (64 GPUs, or 32 x 2)
#            --config run.yaml  flags in a file; those of configs/internvl/finetune_v1_2.yaml are the defaults, and typed
#            flags win. Devices and nodes: see scripts/launch.sh. All flags: python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch "$ROOT/scripts/zero3.json" "$ROOT/configs/internvl/finetune_v1_2.yaml" "$@"
