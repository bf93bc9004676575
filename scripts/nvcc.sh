#!/usr/bin/env bash
# Prints the path of an nvcc: NVCC, CUDA_HOME, PATH, or else NVIDIA's PyPI packages, installed into target/nvcc-venv
# (105 MB; no GPU, no driver, nothing outside target/).
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -n "${NVCC:-}" ]; then
  echo "$NVCC"
elif [ -n "${CUDA_HOME:-}" ] && [ -x "$CUDA_HOME/bin/nvcc" ]; then
  echo "$CUDA_HOME/bin/nvcc"
elif command -v nvcc; then
  :
else
  venv=target/nvcc-venv
  if ! ls "$venv"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc >/dev/null 2>&1; then
    mkdir -p target
    python3 -m venv "$venv" >&2
    "$venv/bin/pip" install -q --no-cache-dir --no-compile 'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.2' >&2
  fi
  echo "$PWD/$venv"/lib/python3*/site-packages/nvidia/cu13/bin/nvcc
fi
