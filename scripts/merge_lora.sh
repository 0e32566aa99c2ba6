#!/usr/bin/env bash
# Merge a LoRA adapter, and the projector or ViT trained with it, into the unquantized base; writes a checkpoint.
# Usage:     scripts/merge_lora.sh --model-path BASE --lora-path ADAPTER --save-model-path OUT [--dtype float32]
# Dry run:   DRY_RUN=1 prints the command.
set -euo pipefail
GPUS=0
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
command=("$PYTHON" -m yivl.train.merge "$@")
run_command
