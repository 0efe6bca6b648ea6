#!/usr/bin/env bash
# A sweep on a Slurm cluster. Copy this file, edit the two lists, and run the copy on a login node, in the folder where
# runs/ should be: every point is composed and checked before anything is submitted, and one array holds them all.
#
#   ./my_sweep.sh plan=true    check every point, and print what would be asked of Slurm
#   ./my_sweep.sh              submit, and return
#
# The same command again submits only what is neither done nor in the queue.
set -euo pipefail

sweep=(
  exp_name=my_sweep
  stage=train
  loss=dpo,simpo,ipo
  seed=0,1
  model=qwen2_5_0_5b
  training.save_every_steps=100 # where a job goes on that ended without notice, as its node failed
)
cluster=(
  hydra/launcher=slurm_1x8 # or slurm_cpu, or slurm_2x8 with hardware.num_nodes=2
  hardware=zero2
  hydra.launcher.timeout_min=720
  # hydra.launcher.partition=gpu
  # hydra.launcher.account=my_project
  # 'hydra.launcher.setup=["module load cuda", "export HF_HUB_OFFLINE=1"]'
)

prefpipe -m "${sweep[@]}" "${cluster[@]}" launch.detach=true "$@"
