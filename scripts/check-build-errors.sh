#!/usr/bin/env bash
# What build.rs says where a build with the `cuda` feature cannot go on: each message names what is missing and how to
# get it. Needs CUDA_HOME (scripts/cuda-toolchain.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CUDA_HOME:?set it, or eval \"\$(scripts/cuda-toolchain.sh)\"}"

# Not in the system's folder for temporary files, which may forbid running programs.
mkdir -p target
work=$(mktemp -d "$PWD/target/check-build-errors.XXXXXX")
trap 'rm -rf "$work"' EXIT
rustc --edition 2021 -o "$work/build" build.rs
printf '#!/bin/sh\necho "Cuda compilation tools, release 11.8, V11.8.89"\n' >"$work/nvcc-11"
chmod +x "$work/nvcc-11"

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
expect "is CUDA 11.8; the kernels need 12.0 or newer" PATH=/usr/bin:/bin NVCC="$work/nvcc-11"
expect "nvcc needs a host C++ compiler" PATH=/nonexistent CUDA_HOME="$CUDA_HOME" CUDA_COMPUTE_CAP=80
expect '"hopper" is no compute capability' "${home[@]}" CUDA_COMPUTE_CAP=hopper
expect "get a newer CUDA toolkit" "${home[@]}" CUDA_COMPUTE_CAP=999
expect "run as composed candle graphs" "${home[@]}" CUDA_COMPUTE_CAP=75

# Without the feature nothing is looked for, for docs.rs nothing compiled.
said=$(env -i OUT_DIR="$work" PATH=/nonexistent "$work/build"; env -i OUT_DIR="$work" CARGO_FEATURE_CUDA=1 DOCS_RS=1 "$work/build")
if grep -E '^cargo::error' <<<"$said"; then exit 1; fi
echo "build.rs explains itself"
