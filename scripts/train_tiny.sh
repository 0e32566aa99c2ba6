#!/usr/bin/env bash
# Train a small bilingual Yi-VL from scratch: data, language model, CLIP, patch naming, the three stages, evaluation, a
# report with the time of each step (docs/tiny.md).
# Usage:     [OUT=out/tiny] scripts/train_tiny.sh
# Optional:  SMOKE=1  a few steps of every phase, in minutes; checks that it runs
#            THREADS=2  CPU threads    PYTHON=.venv/bin/python
# The same command resumes an interrupted run. Every phase ends with held-out scores and their targets.
set -euo pipefail
# shellcheck source=scripts/launch.sh
source "$(dirname "${BASH_SOURCE[0]}")/launch.sh"
export PYTHON
OUT=${OUT:-out/tiny} THREADS=${THREADS:-2}
export OMP_NUM_THREADS=$THREADS
mkdir -p "$OUT"

# Optimizer steps, scenes, and questions of each kind in the evaluations between and after the stages.
language_steps=8000 clip_steps=300 naming_steps=8000 stage1_steps=500 stage2_steps=800 stage3_rows=28000
caption_scenes=22000 gate=50 exam=200
if [[ ${SMOKE:-0} == 1 ]]; then
  language_steps=4 clip_steps=1 naming_steps=4 stage1_steps=2 stage2_steps=2 stage3_rows=32
  caption_scenes=128 gate=2 exam=2
fi

# once RESULT COMMAND...: run the command unless RESULT exists, and record its time.
once() {
  local result=$1 start=$SECONDS
  shift
  if [[ -e $result ]]; then
    echo "== $result is there"
  else
    echo "== $result"
    "$@"
    printf '%s\t%s\n' "${result#"$OUT"/}" $((SECONDS - start)) >>"$OUT/seconds.tsv"
  fi
}

# generated FOLDER ARGUMENTS...: data of the synthetic world; the folder appears when it is complete.
generated() {
  local folder=$1
  shift
  rm -rf "$folder.partial"
  "$PYTHON" -m yivl.tiny.world "$@" --output_dir "$folder.partial"
  mv "$folder.partial" "$folder"
}

# evaluated NAME MODEL SPLIT [flags...]: exact match on an evaluation set.
evaluated() {
  local name=$1 model=$2 split=$3
  shift 3
  "$PYTHON" -m yivl.eval rows --model-path "$model" --data "$OUT/examination-$split/rows.json" \
    --image-folder "$OUT/examination-$split" --group-by kind language --device cpu --dtype float32 \
    --output "$OUT/scores/$name" "$@" >/dev/null
  "$PYTHON" -m yivl.tiny.recipe.report gate --scores "$OUT/scores/$name"
}

# stage NUMBER MODEL FLAGS...: a stage of Yi-VL with the image sizes and learning rates of this model.
stage() {
  local number=$1 model=$2
  shift 2
  MODEL=$model OUT=$OUT/stage$number GLOBAL_BATCH=16 MICRO_BATCH=16 \
    "$ROOT/scripts/train_stage$number.sh" --bf16 True --attn_implementation eager --gradient_checkpointing False \
    --vision_gradient_checkpointing False --dataloader_num_workers 1 --model_max_length 512 --save_steps 500 \
    --save_total_limit 1 --max_grad_norm 1 --resume auto "$@"
}

once "$OUT/captions" generated "$OUT/captions" captions --number "$caption_scenes"
once "$OUT/dialogues" generated "$OUT/dialogues" dialogues --number "$stage3_rows" --first 1000000
for split in scenes combinations sizes; do
  once "$OUT/examination-$split" generated "$OUT/examination-$split" examination --split "$split" --number "$exam"
done
once "$OUT/examination-gate" generated "$OUT/examination-gate" examination --split scenes --number "$gate"

tiny=("$PYTHON" -m yivl.tiny.recipe)
limits=(--questions "$gate" --threads "$THREADS")
once "$OUT/language_model.training/gate.json" "${tiny[@]}" language_model --output_dir "$OUT/language_model" \
  --steps "$language_steps" "${limits[@]}"
once "$OUT/clip.training/gate.json" "${tiny[@]}" clip --language_model "$OUT/language_model" --output_dir "$OUT/clip" \
  --steps "$clip_steps" "${limits[@]}"
once "$OUT/naming.training/gate.json" "${tiny[@]}" naming --language_model "$OUT/language_model" \
  --vision_tower "$OUT/clip" --output_dir "$OUT/naming" --steps "$naming_steps" "${limits[@]}"

shards="$OUT/captions/{00000..$(printf %05d $(((caption_scenes + 999) / 1000 - 1)))}.tar"
DATA=$shards once "$OUT/stage1/config.json" stage 1 "$OUT/naming" --image_size 96 --max_steps "$stage1_steps" \
  --learning_rate 3e-4
once "$OUT/scores/stage1/scores.json" evaluated stage1 "$OUT/stage1" gate
DATA=$shards once "$OUT/stage2/config.json" stage 2 "$OUT/stage1" --image_size 192 --max_steps "$stage2_steps" \
  --learning_rate 3e-4
once "$OUT/scores/stage2/scores.json" evaluated stage2 "$OUT/stage2" gate
DATA=$OUT/dialogues/rows.json IMAGES=$OUT/dialogues once "$OUT/stage3/config.json" stage 3 "$OUT/stage2" \
  --image_size 192 --num_train_epochs 1 --learning_rate 3e-4 --group_by_length True

for split in scenes combinations sizes; do
  once "$OUT/scores/$split/scores.json" evaluated "$split" "$OUT/stage3" "$split"
done
for control in another none; do
  once "$OUT/scores/$control/scores.json" evaluated "$control" "$OUT/stage3" scenes --images "$control"
done
# Ablation: stage 2 without stage 1.
DATA=$shards once "$OUT/stage2-alone/config.json" stage 2 "$OUT/naming" --image_size 192 \
  --max_steps "$stage2_steps" --learning_rate 3e-4 --output_dir "$OUT/stage2-alone"
once "$OUT/scores/stage2-alone/scores.json" evaluated stage2-alone "$OUT/stage2-alone" gate
"$PYTHON" -m yivl.tiny.recipe.report report --output_dir "$OUT"
