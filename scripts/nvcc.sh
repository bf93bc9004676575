#!/usr/bin/env bash
# Prints the path of an nvcc: NVCC, CUDA_HOME, PATH, or else the one that scripts/cuda-toolchain.sh installs.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${NVCC:-}" ]; then
  echo "$NVCC"
elif [ -n "${CUDA_HOME:-}" ] && [ -x "$CUDA_HOME/bin/nvcc" ]; then
  echo "$CUDA_HOME/bin/nvcc"
elif command -v nvcc; then
  :
else
  toolchain=$(scripts/cuda-toolchain.sh)
  eval "$toolchain"
  echo "$CUDA_HOME/bin/nvcc"
fi
