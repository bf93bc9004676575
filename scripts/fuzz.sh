#!/usr/bin/env bash
# Fuzzes with coverage guidance on a stable toolchain. The passes that cargo-fuzz asks a nightly for are LLVM's own, and
# a stable rustc hands them on.
#
#   scripts/fuzz.sh build
#   scripts/fuzz.sh TARGET SECONDS [libFuzzer's arguments]      TARGET: a name in fuzz/targets
set -euo pipefail
cd "$(dirname "$0")/../fuzz"
triple=$(rustc -vV | sed -n 's/^host: //p')
flags="-Cpasses=sancov-module -Cllvm-args=-sanitizer-coverage-level=3 -Cllvm-args=-sanitizer-coverage-trace-compares
  -Cllvm-args=-sanitizer-coverage-inline-8bit-counters -Cllvm-args=-sanitizer-coverage-pc-table --cfg fuzzing"
if [[ $1 == build ]]; then
  # With --target the flags leave build scripts and macros alone.
  RUSTFLAGS=$(echo $flags) exec cargo build --release --target "$triple"
fi
target=$1 seconds=$2
shift 2
mkdir -p "corpus/$target" "artifacts/$target"
# One thread: the same input has to take the same path. Memory files live in /dev/shm where there is one.
export RAYON_NUM_THREADS=1 CANDLE_NUM_THREADS=1
[[ -d /dev/shm ]] && export TMPDIR=/dev/shm
# Long inputs from the start: where an input ends that a target draws from, zeros are drawn.
seeds=()
[[ -d seeds/$target ]] && seeds=("seeds/$target")
exec "target/$triple/release/$target" "corpus/$target" "${seeds[@]}" -artifact_prefix="artifacts/$target/" \
  -max_total_time="$seconds" -rss_limit_mb=2048 -timeout=600 -max_len=4096 -len_control=0 -print_final_stats=1 "$@"
