#!/usr/bin/env bash
# Sourced by the training and evaluation scripts: finds the devices, prints and runs the command.
# Optional:  GPUS=all visible  GPUs of this node, 0 for none   PROCESSES=1  processes of this node without a GPU
#            NNODES=1 NODE_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29500   for several nodes, each of which runs the script
#            NODE_TIMEOUT=60  seconds after which a node that does not answer is lost
#            MAX_RESTARTS=0  restarts after a failure   NNODES=3:4  from 3 to 4 nodes; with --resume auto
#            HOSTFILE=hosts  for several nodes, started from this one over ssh by DeepSpeed
#            DEEPSPEED=scripts/zeroN.json  ("" for none; without a GPU the default is none)
#            MODEL VIT PROJECTOR  --model_name_or_path --vision_tower --pretrain_mm_mlp_adapter
#            DATA IMAGES OUT  --data_path --image_folder --output_dir
#            GLOBAL_BATCH MICRO_BATCH  --global_batch_size --per_device_train_batch_size
#            PYTHON=.venv/bin/python   DRY_RUN=1  print the command and stop
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Use the code of this repository; the working directory, and so relative paths, stay the caller's.
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH}
if [[ -z ${PYTHON:-} ]]; then
  PYTHON=python3
  [[ -x $ROOT/.venv/bin/python ]] && PYTHON=$ROOT/.venv/bin/python
fi
if [[ ${GPUS:-0} -gt 0 && -z ${CUDA_VISIBLE_DEVICES+set} ]]; then
  CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((GPUS - 1))) # otherwise one process sees all GPUs
  export CUDA_VISIBLE_DEVICES
fi
if [[ -z ${GPUS:-} ]]; then
  GPUS=0
  command -v nvidia-smi >/dev/null && GPUS=$( (nvidia-smi --list-gpus 2>/dev/null || true) | wc -l)
  # nvidia-smi also lists GPUs that CUDA_VISIBLE_DEVICES hides.
  ((GPUS > 0)) && [[ -n ${CUDA_VISIBLE_DEVICES+set} ]] && GPUS=$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .) || true
fi
NNODES=${NNODES:-1} MASTER_ADDR=${MASTER_ADDR:-127.0.0.1} MASTER_PORT=${MASTER_PORT:-29500}
processes=$((GPUS > 0 ? GPUS : ${PROCESSES:-1}))
if [[ -n ${HOSTFILE:-} ]]; then
  NNODES=$(grep -c '^[^#[:space:]]' "$HOSTFILE" || true)
  ((NNODES > 0)) || { echo "error: HOSTFILE=$HOSTFILE names no host" >&2; exit 2; }
fi

# processes_of MODULE: sets `command` to start the module in all processes of this node.
processes_of() {
  local module=$1
  command=("$PYTHON" -m "$module")
  if [[ -n ${HOSTFILE:-} ]]; then
    command=("$PYTHON" -m deepspeed.launcher.runner --hostfile "$HOSTFILE" --master_port "$MASTER_PORT"
      --no_local_rank --module "$module")
  elif [[ $NNODES != 1 ]]; then
    local rendezvous=(--node-rank "${NODE_RANK:-0}" --master-addr "$MASTER_ADDR" --master-port "$MASTER_PORT")
    if [[ $NNODES == *:* || ${MAX_RESTARTS:-0} != 0 ]]; then # nodes may leave and join
      rendezvous=(--rdzv-backend c10d --rdzv-endpoint "$MASTER_ADDR:$MASTER_PORT" --rdzv-id yivl
        --rdzv-conf "is_host=$((${NODE_RANK:-0} == 0))" --max-restarts "${MAX_RESTARTS:-0}")
    fi
    command=("$PYTHON" -m yivl.train.launch --nproc-per-node "$processes" --nnodes "$NNODES" "${rendezvous[@]}"
      -m "$module")
  elif ((processes > 1)) || [[ ${MAX_RESTARTS:-0} != 0 ]]; then # on a free port
    command=("$PYTHON" -m yivl.train.launch --standalone --nproc-per-node "$processes"
      --max-restarts "${MAX_RESTARTS:-0}" -m "$module")
  fi
}

# run_command: prints `command` and runs it.
run_command() {
  printf '%q ' "${command[@]}"
  echo
  [[ ${DRY_RUN:-0} == 1 ]] || exec "${command[@]}"
}

# evaluate BENCHMARK [flags...]
evaluate() {
  processes_of yivl.eval
  command+=("$1")
  [[ -n ${MODEL:-} ]] && command+=(--model-path "$MODEL")
  [[ -n ${DATA:-} ]] && command+=(--data "$DATA")
  [[ -n ${OUT:-} ]] && command+=(--output "$OUT")
  command+=("${@:2}")
  run_command
}

# launch DEFAULT_ZERO CONFIG [flags of the user...]
# CONFIG, a file or a mapping in braces, holds what a --config of the user and flags replace. Variables count as flags.
launch() {
  local zero=$1 config=$2
  shift 2
  processes_of yivl.train
  command+=(--config "$config")
  if ((GPUS > 0)); then
    command+=(--config "{bf16: true, tf32: true}")
    [[ -z ${DEEPSPEED+set} && -n $zero ]] && command+=(--config "{deepspeed: '$zero'}")
  fi
  [[ -n ${DEEPSPEED:-} ]] && command+=(--deepspeed "$DEEPSPEED")
  [[ -n ${MODEL:-} ]] && command+=(--model_name_or_path "$MODEL")
  [[ -n ${VIT:-} ]] && command+=(--vision_tower "$VIT")
  [[ -n ${PROJECTOR:-} ]] && command+=(--pretrain_mm_mlp_adapter "$PROJECTOR")
  [[ -n ${DATA:-} ]] && command+=(--data_path "$DATA")
  [[ -n ${IMAGES:-} ]] && command+=(--image_folder "$IMAGES")
  [[ -n ${OUT:-} ]] && command+=(--output_dir "$OUT")
  [[ -n ${GLOBAL_BATCH:-} ]] && command+=(--global_batch_size "$GLOBAL_BATCH")
  [[ -n ${MICRO_BATCH:-} ]] && command+=(--per_device_train_batch_size "$MICRO_BATCH")
  command+=("$@")
  run_command
}
