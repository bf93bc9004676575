#!/usr/bin/env bash
# A CUDA toolchain for a machine that has none, without root and without a GPU. It has two nvcc from PyPI (240 MB,
# seconds) and stand-ins for the driver's libraries to link against. Idempotent. Prints the environment to build with:
#
#   eval "$(scripts/cuda-toolchain.sh)"
#   cargo test --release --features cuda
#
# CUDA_HOME is the older one. It builds candle's own kernels, which are embedded as PTX: a driver refuses PTX of a newer
# CUDA than its own. CANDLE_SAM_LORA_NVCC is the newest one. It builds this crate's kernels, which are embedded as machine
# code, and it is free of a miscompilation that the older one has (docs/cuda.md).
#
# usage: cuda-toolchain.sh [DIR]      (default: target/cuda-toolchain)
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:-target/cuda-toolchain}
mkdir -p "$directory"
directory=$(realpath "$directory")

root() { echo "$directory/$1"/lib/python3*/site-packages/nvidia/cu13; }

# install VENV RELEASE [PACKAGE..]: nvcc of this CUDA release. The extras pin every part to it.
install() {
  local venv=$directory/$1 release=$2
  shift 2
  python3 -m venv --clear "$venv" >&2
  "$venv/bin/pip" install -q --disable-pip-version-check --no-cache-dir --no-compile \
    "cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==$release" "$@" >&2
}

if ! [ -e "$directory/complete" ]; then
  install venv 13.0.2
  cuda=$(root venv)
  ln -sfn lib "$cuda/lib64"                               # where nvcc looks for libraries
  ln -sfn libcudart_static.a "$cuda/lib/libcudart.a"      # -lcudart links statically: nothing to find at run time
  cargo fetch -q >&2
  cudarc=$(cargo metadata --format-version 1 --all-features --offline |
    python3 -c 'import json, os, sys
print(*[os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"])')
  python3 scripts/gen_stubs.py "$cuda/lib/stubs" "$cudarc" >&2
  touch "$directory/complete"
fi

# nvdisasm reads what the older compilers wrote, too.
newest=13.5.0
if ! [ -e "$directory/newest/$newest" ]; then
  install newest "$newest" nvidia-cuda-nvdisasm==13.5.37
  touch "$directory/newest/$newest"
fi

cuda=$(root venv)
echo "export CUDA_HOME=$cuda"
echo "export PATH=$cuda/bin:\$PATH"
echo "export CANDLE_SAM_LORA_NVCC=$(root newest)/bin/nvcc"
# candle's own kernels want one capability where no GPU can be asked; PTX of 8.0 runs on everything newer.
echo 'export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}'
# A driver that is there goes before its stand-in. Not `grep -q`: it would leave early, and ldconfig die of the broken
# pipe. A user's PATH may lack /sbin.
if ! PATH=$PATH:/usr/sbin:/sbin ldconfig -p | grep 'libcuda\.so\.1' >/dev/null; then
  echo "export LD_LIBRARY_PATH=$cuda/lib/stubs\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
fi
