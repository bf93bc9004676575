#!/usr/bin/env bash
# Prints the paths of the nvcc that the kernels have to be right with, one a line. The first is that of NVCC, CUDA_HOME or
# PATH, the last CANDLE_SAM_LORA_NVCC. Without any, those that scripts/cuda-toolchain.sh installs.
set -euo pipefail
cd "$(dirname "$0")/.."

find_nvcc() {
  if [ -n "${NVCC:-}" ]; then
    echo "$NVCC"
  elif [ -n "${CUDA_HOME:-}" ] && [ -x "$CUDA_HOME/bin/nvcc" ]; then
    echo "$CUDA_HOME/bin/nvcc"
  else
    command -v nvcc || true
  fi
  echo "${CANDLE_SAM_LORA_NVCC:-}"
}

found=$(find_nvcc | sed '/^$/d')
if [ -z "$found" ]; then
  toolchain=$(scripts/cuda-toolchain.sh)
  eval "$toolchain"
  found=$(find_nvcc)
fi
uniq <<<"$found"
