#!/usr/bin/env bash
# Packs what scripts/gpu/run.sh needs on a machine with a GPU but no Rust and no network: one stripped binary with the
# GPU tests and benchmarks, the fixtures and assets, the runner. (The comparison with the emulator wants the sources, and is left out.)
#
# usage: bundle.sh [ARCHIVE]      (default: target/gpu-kit.tar.gz)
#
# The kernels are compiled for every GPU, or for those in CANDLE_SAM_LORA_CUDA_ARCHS. The libraries of CUDA are not
# packed: the GPU's machine has them, from its toolkit or from PyTorch.
set -euo pipefail
cd "$(dirname "$0")/../.."
archive=${1:-target/gpu-kit.tar.gz}
limit=$((60 * 1024 * 1024))

# nvcc and stand-ins to link against, if this machine has no CUDA of its own.
if [ ! -x "${CUDA_HOME:-}/bin/nvcc" ]; then eval "$(scripts/cuda-toolchain.sh)"; fi
export CANDLE_SAM_LORA_CUDA_ARCHS=${CANDLE_SAM_LORA_CUDA_ARCHS:-all}
# Optimised in full, unlike CI's, so it has a target folder of its own: cargo does not see these flags change.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/gpu-kit} CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-$(nproc)}
export NVCC_APPEND_FLAGS=-compress-mode=size CANDLE_SAM_LORA_NVCC_FLAGS='-lineinfo -compress-mode=size'

binary=$(cargo test --release --features cuda --test gpu --no-run --message-format=json-render-diagnostics |
  python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "gpu":
        print(message["executable"])')

kit=$(mktemp -d)
trap 'rm -rf "$kit"' EXIT
mkdir -p "$kit/gpu-kit/tests"
strip -o "$kit/gpu-kit/gpu" "$binary"
cp scripts/gpu/run.sh scripts/gpu/peers.py scripts/gpu/report.py "$kit/gpu-kit/"
cp -r tests/fixtures "$kit/gpu-kit/tests/"
cp -r assets "$kit/gpu-kit/"
git describe --always --dirty >"$kit/gpu-kit/VERSION"
tar -C "$kit" -czf "$archive" gpu-kit

size() { stat -c %s "$1"; }
printf 'binary   %11d bytes  %s\narchive  %11d bytes  %s\n' "$(size "$kit/gpu-kit/gpu")" "$binary" "$(size "$archive")" "$archive"
if [ "$(size "$archive")" -gt "$limit" ]; then
  echo "error: the archive is over $limit bytes" >&2
  exit 1
fi
