#!/usr/bin/env bash
# A CUDA toolchain for a machine that has none, without root and without a GPU: nvcc from PyPI (105 MB, seconds) and
# stand-ins for the driver's libraries to link against. Idempotent. Prints the environment to build with:
#
#   eval "$(scripts/cuda-toolchain.sh)"
#   cargo test --release --features cuda
#
# usage: cuda-toolchain.sh [DIR]      (default: target/cuda-toolchain)
set -euo pipefail
cd "$(dirname "$0")/.."
directory=${1:-target/cuda-toolchain}
mkdir -p "$directory"
directory=$(realpath "$directory")

root() { echo "$directory"/venv/lib/python3*/site-packages/nvidia/cu13; }

if ! [ -e "$directory/complete" ]; then
  # The extras pin every part to one CUDA release. cuobjdump and the nvdisasm that it calls, first released for 13.2, read
  # what 13.0 wrote.
  python3 -m venv --clear "$directory/venv" >&2
  "$directory/venv/bin/pip" install -q --disable-pip-version-check --no-cache-dir --no-compile \
    'cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.2' nvidia-cuda-cuobjdump==13.2.78 \
    nvidia-cuda-nvdisasm==13.2.78 >&2
  cuda=$(root)
  ln -sfn lib "$cuda/lib64"                               # where nvcc looks for libraries
  ln -sfn libcudart_static.a "$cuda/lib/libcudart.a"      # -lcudart links statically: nothing to find at run time
  cargo fetch -q >&2
  cudarc=$(cargo metadata --format-version 1 --all-features --offline |
    python3 -c 'import json, os, sys
print(*[os.path.dirname(p["manifest_path"]) for p in json.load(sys.stdin)["packages"] if p["name"] == "cudarc"])')
  python3 scripts/gen_stubs.py "$cuda/lib/stubs" "$cudarc" >&2
  touch "$directory/complete"
fi

cuda=$(root)
echo "export CUDA_HOME=$cuda"
echo "export PATH=$cuda/bin:\$PATH"
# candle's own kernels want one capability where no GPU can be asked; PTX of 8.0 runs on everything newer.
echo 'export CUDA_COMPUTE_CAP=${CUDA_COMPUTE_CAP:-80}'
# A driver that is there goes before its stand-in. Not `grep -q`: it would leave early, and ldconfig die of the broken
# pipe. A user's PATH may lack /sbin.
if ! PATH=$PATH:/usr/sbin:/sbin ldconfig -p | grep 'libcuda\.so\.1' >/dev/null; then
  echo "export LD_LIBRARY_PATH=$cuda/lib/stubs\${LD_LIBRARY_PATH:+:\$LD_LIBRARY_PATH}"
fi
