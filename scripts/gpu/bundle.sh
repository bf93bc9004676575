#!/usr/bin/env bash
# Packs what scripts/gpu/run.sh needs beside the source tree on a machine with a GPU but no Rust and no network. That is one
# stripped binary, which is the GPU tests and every program of the kit (tests/gpu). Fixtures, assets, PyTorch's side of the
# benchmarks and the runner travel with the tree.
#
# usage: bundle.sh [ARCHIVE]      (default: target/gpu-kit.tar.gz)
#
# The kernels are compiled for every GPU, or for those in CANDLE_SAM_LORA_CUDA_ARCHS: `90` alone makes the archive small and
# quick to load. The libraries of CUDA are not packed: the GPU's machine has them, from its toolkit or from PyTorch.
set -euo pipefail
cd "$(dirname "$0")/../.."
archive=${1:-target/gpu-kit.tar.gz}
# Tree and archive share 64 MiB on their way to the machine.
limit=$((44 * 1024 * 1024))

# Two nvcc, the newest for this crate's kernels, and stand-ins to link against, if this machine has no CUDA of its own.
if [ ! -x "${CUDA_HOME:-}/bin/nvcc" ]; then eval "$(scripts/cuda-toolchain.sh)"; fi
# A target folder of its own: CI compiles candle's kernels with other flags, of which cargo does not know.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/gpu-kit} CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-$(nproc)}
export CANDLE_SAM_LORA_CUDA_ARCHS=${CANDLE_SAM_LORA_CUDA_ARCHS:-all}
export CANDLE_SAM_LORA_NVCC_FLAGS='-lineinfo -compress-mode=size'

# Most of nvcc's time goes into candle's kernels for quantised models, which are linked but never run here. They are
# compiled in haste, and all others in full.
mkdir -p "$CARGO_TARGET_DIR/nvcc"
cat >"$CARGO_TARGET_DIR/nvcc/nvcc" <<END
#!/bin/sh
case "\$*" in
  *gguf* | *moe*) exec "$CUDA_HOME/bin/nvcc" "\$@" -Ofc=max -compress-mode=size ;;
  *) exec "$CUDA_HOME/bin/nvcc" "\$@" ;;
esac
END
chmod +x "$CARGO_TARGET_DIR/nvcc/nvcc"
NVCC=$(realpath "$CARGO_TARGET_DIR/nvcc/nvcc")
export NVCC

binary=$(scripts/gpu/build.sh)

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
kit=$folder/gpu-kit
stripped=$folder/gpu
strip -o "$stripped" "$binary"
release() { "$1" --version | sed -n 's/^Cuda compilation tools, //p'; }
scripts/gpu/layout.sh "$stripped" "$kit" "$(release "${CANDLE_SAM_LORA_NVCC:-$NVCC}") for compute capability \
$CANDLE_SAM_LORA_CUDA_ARCHS, $CANDLE_SAM_LORA_NVCC_FLAGS; candle's kernels with $(release "$NVCC") for \
${CUDA_COMPUTE_CAP:-this GPU}, those of quantised models with -Ofc=max"
tar -C "$folder" -czf "$archive" gpu-kit

size() { stat -c %s "$1"; }
printf 'binary   %11d bytes  %s\narchive  %11d bytes  %s\n' "$(size "$stripped")" "$binary" "$(size "$archive")" "$archive"
if [ "$(size "$archive")" -gt "$limit" ]; then
  echo "error: $archive: expected at most $limit bytes, got $(size "$archive"); CANDLE_SAM_LORA_CUDA_ARCHS=90 makes it smaller" >&2
  exit 1
fi
