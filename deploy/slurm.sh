#!/usr/bin/env bash
# One training run on several hosts with a process for each GPU.
#
#   sbatch deploy/slurm.sh photos/ masks/ run/
#
# Submitted again, it goes on from the last saved state; so does Slurm itself after a host was lost (--requeue).
#SBATCH --job-name=candle-sam-lora
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=8
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=candle-sam-lora-%j.log
set -euo pipefail
images=${1:?usage: sbatch slurm.sh IMAGES MASKS OUTPUT}
masks=${2:?usage: sbatch slurm.sh IMAGES MASKS OUTPUT}
output=${3:?usage: sbatch slurm.sh IMAGES MASKS OUTPUT}

resume=()
if [[ -f $output/state.safetensors || -f $output/state.previous.safetensors ]]; then
  resume=(--resume)
fi

# --gpu-bind=none: each process sees all GPUs of its host and takes the one of its local rank. srun does not inherit
# --cpus-per-task. Without PMIx (`srun --mpi=list`), start `mpirun` in the place of srun.
srun --mpi=pmix --gpu-bind=none --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" --kill-on-bad-exit=1 \
  candle-sam-lora finetune --images "$images" --masks "$masks" --output "$output" --device cuda --dtype bf16 "${resume[@]}"
