#!/usr/bin/env bash
# The pre-training of InternVL-Chat-V1-2: train ViT and projector on captions at 448x448; the language model is frozen.
# Usage:     MODEL=NousResearch/Nous-Hermes-2-Yi-34B VIT=OpenGVLab/InternViT-6B-448px-V1-2 DATA='shards/{00000..09999}.tar' \
#              OUT=out/pretrain scripts/internvl/pretrain_v1_2.sh [flags...]
# Required:  MODEL  LLM of the parts, or a checkpoint     VIT  InternViT, for an LLM     DATA  captions or rows (docs/data.md)
#            OUT  folder of the trained model
# Optional:  PROJECTOR  weights of the projector instead of a new one    IMAGES=.  folder of the images of rows
#            GLOBAL_BATCH=8192  samples per optimizer step    MICRO_BATCH=32  samples per GPU
#            --config run.yaml  flags in a file; those of configs/internvl/pretrain_v1_2.yaml are the defaults, and typed
#            flags win. Its learning rate and schedule are not published. Devices and nodes: see scripts/launch.sh.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch.sh"
launch "$ROOT/scripts/zero3.json" "$ROOT/configs/internvl/pretrain_v1_2.yaml" "$@"
