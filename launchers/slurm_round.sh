#!/usr/bin/env bash
# One round as a chain of Slurm jobs, each stage on the machine that it needs. Copy this file, edit it, and run the copy
# on a login node. A stage starts when the one before it has ended well. After a failure, give the same command again:
# stages that are done end at once.
set -euo pipefail

run=(
  exp_name=my_round
  round=0
  model=qwen2_5_0_5b
  data_mixer=gsm8k
  training.save_every_steps=100
)
cpu=(--cpus-per-task=8 --mem=32G --time=4:00:00)
one_gpu=(--gpus=1 --cpus-per-task=12 --mem=100G --time=12:00:00)
eight_gpus=(--nodes=1 --gpus=8 --cpus-per-task=96 --mem=900G --time=24:00:00)

mkdir -p runs/logs
previous=
submit() { # stage, then options of sbatch
  local stage=$1
  shift
  previous=$(sbatch --parsable ${previous:+--dependency=afterok:$previous} --requeue --open-mode=append \
    --job-name="prefpipe-$stage" --output="runs/logs/%x-%j.log" "$@" \
    --wrap="exec prefpipe stage=$stage ${run[*]@Q} ${extra[*]@Q}")
  echo "$stage: job $previous"
}

extra=() && submit prepare "${cpu[@]}"
extra=() && submit generate "${one_gpu[@]}"
extra=() && submit score "${one_gpu[@]}"
extra=() && submit pair "${cpu[@]}"
extra=(hardware=zero2) && submit train "${eight_gpus[@]}"
extra=() && submit evaluate "${one_gpu[@]}"
