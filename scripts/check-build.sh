#!/usr/bin/env bash
# Checks build.rs with the `cuda` feature: what it compiles by nvcc, and its errors where it cannot go on. Each error
# names the missing thing and how to get it. Needs CUDA_HOME (scripts/cuda-toolchain.sh).
set -euo pipefail
cd "$(dirname "$0")/.."
: "${CUDA_HOME:?set it, or eval \"\$(scripts/cuda-toolchain.sh)\"}"

# Not in the system's folder for temporary files, which may forbid running programs.
mkdir -p target
work=$(mktemp -d "$PWD/target/check-build.XXXXXX")
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

# A small kernel, portable and as one for Hopper: fat binaries that hold code for each architecture that was named.
mkdir -p "$work/kernels/concat/sm90"
cp kernels/*.h "$work/kernels"
cp -r kernels/common "$work/kernels"
cp kernels/concat/concat.cu "$work/kernels/concat"
cp kernels/concat/concat.cu "$work/kernels/concat/sm90"
said=$(cd "$work" && env -i OUT_DIR="$work" NUM_JOBS=2 CARGO_FEATURE_CUDA=1 "${home[@]}" CANDLE_SAM_LORA_CUDA_ARCHS='86;90a' ./build)
if grep -E '^cargo::error' <<<"$said"; then exit 1; fi
python3 - "$work/images.rs" <<'EOF'
import re, struct, sys

images = dict(re.findall(r'\("(\w+)", include_bytes!\("(.*)"\)\)', open(sys.argv[1]).read()))
PTX, MACHINE_CODE = 1, 2
expected = {
    "concat": {(MACHINE_CODE, 86), (MACHINE_CODE, 90), (PTX, 86)},
    "concat_sm90": {(MACHINE_CODE, 90)},
}
found = {}
for name, path in images.items():
    data = open(path, "rb").read()
    magic, _, at, size = struct.unpack_from("<IHHQ", data)
    assert magic == 0xBA55ED50 and at + size == len(data), f"{path} is no fat binary"
    found[name] = set()
    while at < len(data):
        kind, _, header, payload = struct.unpack_from("<HHIQ", data, at)
        found[name].add((kind, *struct.unpack_from("<I", data, at + 28)))
        at += header + payload
assert found == expected, f"expected {expected}, got {found}"
EOF

# A release without faults gets no warning.
said=$(env -i OUT_DIR="$work" NUM_JOBS=1 CARGO_FEATURE_CUDA=1 PATH=/usr/bin:/bin NVCC="$work/nvcc-13.3" "$work/build")
if grep -E '^cargo::warning' <<<"$said"; then exit 1; fi

# Without the feature nothing is looked for, for docs.rs nothing compiled.
said=$(env -i OUT_DIR="$work" PATH=/nonexistent "$work/build"; env -i OUT_DIR="$work" CARGO_FEATURE_CUDA=1 DOCS_RS=1 "$work/build")
if grep -E '^cargo::error' <<<"$said"; then exit 1; fi
echo "build.rs explains itself"
