#!/usr/bin/env bash
# Checks the errors of build.rs where a build with the `cuda` feature cannot go on. Each error names the missing thing
# and how to get it. Needs CUDA_HOME (scripts/cuda-toolchain.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CUDA_HOME:?set it, or eval \"\$(scripts/cuda-toolchain.sh)\"}"

# Not in the system's folder for temporary files, which may forbid running programs.
mkdir -p target
work=$(mktemp -d "$PWD/target/check-build-errors.XXXXXX")
trap 'rm -rf "$work"' EXIT
rustc --edition 2021 -o "$work/build" build.rs
# Says that it is of this release, knows Hopper, and compiles nothing.
for release in 11.8 12.8 13.0 13.3; do
  printf '#!/bin/sh\necho "release %s, V%s.1"\necho sm_86 sm_90\n' "$release" "$release" >"$work/nvcc-$release"
  chmod +x "$work/nvcc-$release"
done

# expect TEXT VARIABLE=VALUE..: the script, with no other environment, says so.
expect() {
  local text=$1 said
  shift
  said=$(env -i OUT_DIR="$work" NUM_JOBS=1 CARGO_FEATURE_CUDA=1 "$@" "$work/build")
  if ! grep -E '^cargo::(error|warning)=' <<<"$said" | grep -F -- "$text" >/dev/null; then
    printf 'error: with %s\nexpected: %s\ngot:\n%s\n' "$*" "$text" "$said" >&2
    exit 1
  fi
}
home=(PATH=/usr/bin:/bin CUDA_HOME="$CUDA_HOME")
expect "the cuda feature needs nvcc" PATH=/nonexistent
expect "developer.nvidia.com" PATH=/nonexistent
expect "is CUDA 11.8; the kernels need 12.0 or newer" PATH=/usr/bin:/bin NVCC="$work/nvcc-11.8"
expect "CUDA 12.8: ptxas serialises wgmma" PATH=/usr/bin:/bin NVCC="$work/nvcc-12.8"
expect "CUDA 13.0: Hopper's attention backward reads keys from shared memory" PATH=/usr/bin:/bin NVCC="$work/nvcc-13.0"
expect "CUDA 13.0: ptxas may corrupt registers" PATH=/usr/bin:/bin NVCC="$work/nvcc-13.0" CANDLE_SAM_LORA_CUDA_ARCHS=86
expect "nvcc needs a host C++ compiler" PATH=/nonexistent CUDA_HOME="$CUDA_HOME" CUDA_COMPUTE_CAP=80
expect '"hopper" is no compute capability' "${home[@]}" CUDA_COMPUTE_CAP=hopper
expect "get a newer CUDA toolkit" "${home[@]}" CUDA_COMPUTE_CAP=999
expect "run as composed candle graphs" "${home[@]}" CUDA_COMPUTE_CAP=75

# A release without faults gets no warning.
said=$(env -i OUT_DIR="$work" NUM_JOBS=1 CARGO_FEATURE_CUDA=1 PATH=/usr/bin:/bin NVCC="$work/nvcc-13.3" "$work/build")
if grep -E '^cargo::warning' <<<"$said"; then exit 1; fi

# Without the feature nothing is looked for, for docs.rs nothing compiled.
said=$(env -i OUT_DIR="$work" PATH=/nonexistent "$work/build"; env -i OUT_DIR="$work" CARGO_FEATURE_CUDA=1 DOCS_RS=1 "$work/build")
if grep -E '^cargo::error' <<<"$said"; then exit 1; fi
echo "build.rs explains itself"
