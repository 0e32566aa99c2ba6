#!/usr/bin/env bash
# Fine-tune Yi-VL with LoRA adapters of rank 8 on all linear layers of the language model; all weights are frozen.
# Usage:     scripts/finetune_lora.sh --model_name_or_path M --data_path D --image_folder I --output_dir O [flags...]
#            MODEL=M DATA=D IMAGES=I OUT=O scripts/finetune_lora.sh [flags...]
# Required:  MODEL  Yi-VL checkpoint, folder or hub id     DATA  conversations (docs/data.md)     OUT  folder to write
# Optional:  IMAGES=.  folder of the images    MICRO_BATCH=1  samples per GPU
#            GLOBAL_BATCH=8 x MICRO_BATCH x processes  samples per optimizer step
#            devices and nodes: see scripts/launch.sh. Flags come last and win: --lora_r 64, --lora_vision_tower True, and
#            --freeze_mm_mlp_adapter False to train the projector too. All flags: python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
# Then:      scripts/merge_lora.sh --model-path M --lora-path O --save-model-path MERGED
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
MICRO_BATCH=${MICRO_BATCH:-1}
# Source: the LLaMA-Factory recipe for Yi-VL-6B, Deep-Spark/DeepSparkHub, models/nlp/llm/yi-vl-6b/pytorch.
flags=(--lora_enable True --lora_r 8 --lora_alpha 16 --freeze_mm_mlp_adapter True --learning_rate 1e-4
  --lr_scheduler_type cosine --warmup_ratio 0.1 --num_train_epochs 3 --gradient_checkpointing True)
launch "$ROOT/scripts/zero2.json" "${GLOBAL_BATCH:-$((8 * MICRO_BATCH * processes * NNODES))}" "$MICRO_BATCH" "${flags[@]}" -- "$@"
