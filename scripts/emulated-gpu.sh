#!/usr/bin/env bash
# Runs the GPU tests without a GPU: candle and this crate with the `cuda` feature, on a stand-in for the driver. The
# stand-in (emulator/driver) runs the kernels in the emulator. It plays a Hopper GPU or, with EMULATED_CAPABILITY=80, an
# older one.
#
# EMULATED_CARGO_FLAGS are more words for cargo, say `--features hub`.
#
# With EMULATOR_SANITIZE=address,undefined a kernel that reaches past a tensor or its workspace is reported.
#
# usage: emulated-gpu.sh [part of the tests' names] [other arguments of cargo test]
#
#        emulated-gpu.sh --dry-run [--write]         counts launches and memory, against scripts/launch-budget.tsv or into it
#
#        emulated-gpu.sh --cargo COMMAND [arguments]      cargo alone: what it builds serves the other calls, and finds no GPU
#
#        emulated-gpu.sh --kit [arguments of scripts/gpu/kit.py]     the GPU kit, small and with time to spare
set -euo pipefail
cd "$(dirname "$0")/.."
toolchain=$(scripts/cuda-toolchain.sh)
eval "$toolchain"
target=${CARGO_TARGET_DIR:-$PWD/target}

# The emulator compiles the kernels itself. The output of nvcc would be loaded and never run, so a stand-in for nvcc
# leaves the kernels' code out.
cuda=$target/emulated-gpu
mkdir -p "$cuda"
cat >"$cuda/nvcc" <<EOF
#!/usr/bin/env bash
[[ \$1 == --fatbin ]] || exec "$CANDLE_SAM_LORA_NVCC" "\$@"
while [[ \$1 != -o ]]; do shift; done
printf '\x50\xed\x55\xba' >"\$2" # a fat binary's magic number
EOF
chmod +x "$cuda/nvcc"
export CANDLE_SAM_LORA_NVCC=$cuda/nvcc CANDLE_SAM_LORA_KERNEL_CACHE=$cuda/kernels CANDLE_SAM_LORA_CUDA_ARCHS='80;90'

read -ra flags <<<"--release --features cuda ${EMULATED_CARGO_FLAGS:-}"
if [ "${1:-}" = --cargo ]; then exec cargo "$2" "${flags[@]}" "${@:3}"; fi

cargo build --release -p candle-sam-lora-driver
preload=$target/release/libcandle_sam_lora_driver.so
if [ -n "${EMULATOR_SANITIZE:-}" ]; then
  # The sanitizer's runtime has to be the first library of all.
  preload=$("${CXX:-c++}" -print-file-name=libasan.so):$preload
  export ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=halt_on_error=1:print_stacktrace=1
fi
triple=$(rustc -vV | sed -n 's/^host: //p' | tr 'a-z-' 'A-Z_')
export "CARGO_TARGET_${triple}_RUNNER=env LD_PRELOAD=$preload"
if [ "${1:-}" = --kit ]; then
  kit=$cuda/kit
  binary=$(scripts/gpu/build.sh)
  scripts/gpu/layout.sh "$binary" "$kit" "the emulator"
  export LD_PRELOAD=$preload
  exec python3 scripts/gpu/kit.py --kit "$kit" --small --watchdog 120 --results "$cuda/results" "${@:2}"
fi
if [ "${1:-}" = --dry-run ]; then
  [ "${2:-}" != --write ] || export CANDLE_SAM_LORA_WRITE_BUDGET=1
  export EMULATED_DRY_RUN=1
  set -- 'dry run'
fi
CANDLE_SAM_LORA_REQUIRE_GPU=1 cargo test "${flags[@]}" --test gpu -- "$@"
