#!/usr/bin/env bash
# Fine-tune Yi-VL with QLoRA: LoRA adapters on a language model in 4 bits (nf4, double quantization).
# Usage:     scripts/finetune_qlora.sh --model_name_or_path M --data_path D --image_folder I --output_dir O [flags...]
#            MODEL=M DATA=D IMAGES=I OUT=O scripts/finetune_qlora.sh [flags...]
# Required:  MODEL  Yi-VL checkpoint, folder or hub id     DATA  conversations (docs/data.md)     OUT  folder to write
# Optional:  IMAGES=.  folder of the images    MICRO_BATCH=1  samples per GPU
#            GLOBAL_BATCH=8 x MICRO_BATCH x processes  samples per optimizer step
#            --config run.yaml  flags in a file; bits: 4 and configs/finetune_lora.yaml are the defaults, and typed flags win
#            devices and nodes: see scripts/launch.sh. Flags such as --bits 8 for int8.
#            All flags: python -m yivl.train --help.
# Dry run:   DRY_RUN=1 prints the command; the flag --dry_run prints parameters, data, steps and memory.
# Then:      scripts/merge_lora.sh --model-path M --lora-path O --save-model-path MERGED   (M unquantized, always)
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
# Paged optimizer states move to the CPU when GPU memory is full; this needs a GPU.
((GPUS > 0)) && set -- --config "{optim: paged_adamw_8bit}" "$@"
launch "" "$ROOT/configs/finetune_lora.yaml" --config "{bits: 4}" "$@"
