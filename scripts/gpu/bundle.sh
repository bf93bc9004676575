#!/usr/bin/env bash
# Packs what scripts/gpu/run.sh needs on a machine with a GPU but no Rust and no network: one stripped binary, which is the
# GPU tests, the benchmark `cases`, the example `finetune` and the program `tune`; fixtures, assets, PyTorch's side of the benchmarks, the
# runner. (The comparison with the emulator wants the sources, and is left out.)
#
# usage: bundle.sh [ARCHIVE]      (default: target/gpu-kit.tar.gz)
#
# The kernels are compiled for every GPU, or for those in CANDLE_SAM_LORA_CUDA_ARCHS. The libraries of CUDA are not
# packed: the GPU's machine has them, from its toolkit or from PyTorch.
set -euo pipefail
cd "$(dirname "$0")/../.."
archive=${1:-target/gpu-kit.tar.gz}
limit=$((60 * 1024 * 1024))

# Two nvcc, the newest for this crate's kernels, and stand-ins to link against, if this machine has no CUDA of its own.
if [ ! -x "${CUDA_HOME:-}/bin/nvcc" ]; then eval "$(scripts/cuda-toolchain.sh)"; fi
# A target folder of its own: CI compiles candle's kernels with other flags, of which cargo does not know.
export CARGO_TARGET_DIR=${CARGO_TARGET_DIR:-target/gpu-kit} CUDAFORGE_THREADS=${CUDAFORGE_THREADS:-$(nproc)}
export CANDLE_SAM_LORA_CUDA_ARCHS=${CANDLE_SAM_LORA_CUDA_ARCHS:-all}
export CANDLE_SAM_LORA_NVCC_FLAGS='-lineinfo -compress-mode=size'

# Most of the time of nvcc goes into candle's kernels for quantised models, which are linked but never run here: they
# are compiled in haste, and all others in full.
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

binary=$(cargo test --release --features cuda --test gpu --no-run --message-format=json-render-diagnostics |
  python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "gpu":
        print(message["executable"])')

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
kit=$folder/gpu-kit
mkdir -p "$kit/tests" "$kit/benches"
strip -o "$kit/gpu" "$binary"
ln -s gpu "$kit/cases"
ln -s gpu "$kit/finetune"
ln -s gpu "$kit/tune"
cp scripts/gpu/run.sh scripts/gpu/kit.py "$kit/"
cp -r tests/fixtures "$kit/tests/"
rm -rf "$kit/tests/fixtures/gen"
cp -r benches/peers benches/report "$kit/benches/"
cp -r assets "$kit/"
find "$kit" -name __pycache__ -prune -exec rm -r {} +
git describe --always --dirty >"$kit/VERSION"
release() { "$1" --version | sed -n 's/^Cuda compilation tools, //p'; }
cat >"$kit/BUILD" <<END
Built with $(release "${CANDLE_SAM_LORA_NVCC:-$NVCC}") for compute capability \
$CANDLE_SAM_LORA_CUDA_ARCHS, $CANDLE_SAM_LORA_NVCC_FLAGS; candle's kernels with $(release "$NVCC") for ${CUDA_COMPUTE_CAP:-this GPU}, \
those of quantised models with -Ofc=max; $(rustc --version); needs glibc $(objdump -T "$kit/gpu" |
  grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -1 | cut -d_ -f2) or newer.
END
tar -C "$folder" -czf "$archive" gpu-kit

size() { stat -c %s "$1"; }
printf 'binary   %11d bytes  %s\narchive  %11d bytes  %s\n' "$(size "$kit/gpu")" "$binary" "$(size "$archive")" "$archive"
if [ "$(size "$archive")" -gt "$limit" ]; then
  echo "error: the archive is over $limit bytes" >&2
  exit 1
fi
