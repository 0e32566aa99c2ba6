#!/bin/bash
# Sourced by the jobs: run_training SCRIPT [flags...] runs a script of scripts/ on all nodes of the job, one task per
# node, and requeues the job where it can continue from a checkpoint:
#   before the time limit or a preemption  Slurm sends SIGUSR1 to the job (#SBATCH --signal=B:USR1@600; for preemption,
#                                          PreemptParameters=send_user_signal): a checkpoint is saved, then the requeue
#   after a failure that is not wrong input (exit code 2)  at most MAX_REQUEUES=3 times, counted in
#                                          OUT/slurm-JOB.failures; SLURM_RESTART_COUNT also counts the requeues above
# After a failure of a node or a preemption with SIGTERM, Slurm requeues the job itself (#SBATCH --requeue).
set -euo pipefail
run_training() {
  local script=$1 code step stopped=0 failures count=0
  shift
  export NNODES=$SLURM_NNODES MASTER_PORT=${MASTER_PORT:-29500}
  MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
  export MASTER_ADDR
  # Since Slurm 22.05, a step gets one core unless it is told: srun does not read SLURM_CPUS_PER_TASK.
  if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi
  # SLURM_NODEID is that of each node
  # shellcheck disable=SC2016
  srun bash -c 'NODE_RANK=$SLURM_NODEID exec "scripts/$0" "$@"' "$script" \
    --resume auto --dataloader_num_workers 8 "$@" &
  step=$!
  # srun forwards SIGUSR1 to its tasks.
  trap 'stopped=1; kill -USR1 "$step" 2>/dev/null || true' USR1
  code=0
  wait "$step" || code=$?
  while kill -0 "$step" 2>/dev/null; do # the signal ended the first wait
    code=0
    wait "$step" || code=$?
  done
  if ((code != 0 && code != 2 && !stopped)); then
    failures=${OUT:-.}/slurm-$SLURM_JOB_ID.failures
    mkdir -p "${OUT:-.}"
    echo "$(date '+%F %T') exit code $code" >>"$failures"
    count=$(wc -l <"$failures")
  fi
  if ((code != 0 && (stopped || (code != 2 && count <= ${MAX_REQUEUES:-3})))); then
    echo "requeue: exit code $code, failure $((count))"
    scontrol requeue "$SLURM_JOB_ID"
  fi
  exit "$code"
}
