#!/usr/bin/env bash
# Regenerates what Rust knows of the kernels: src/launch/bindings.rs from kernels/abi.h, and src/launch/tile_table.rs from
# kernels/tiles.h. With --check only says whether one has drifted.
# libclang is taken from LIBCLANG_PATH, or else from PyPI into target/libclang-venv.
set -euo pipefail
cd "$(dirname "$0")/.."

if [ -z "${LIBCLANG_PATH:-}" ]; then
  venv=target/libclang-venv
  if ! ls "$venv"/lib/python3*/site-packages/clang/native/libclang.so >/dev/null 2>&1; then
    mkdir -p target
    python3 -m venv "$venv"
    "$venv/bin/pip" install -q --no-cache-dir --no-compile libclang==18.1.1
  fi
  LIBCLANG_PATH=$(echo "$PWD/$venv"/lib/python3*/site-packages/clang/native)
  export LIBCLANG_PATH
fi

new=$(mktemp -d)
trap 'rm -rf "$new"' EXIT
emulator() { cargo run -q --release -p candle-sam-lora-emulator "$@"; }
emulator --features bindings --bin bindings -- kernels/abi.h >"$new/bindings.rs"
rustfmt --edition 2021 --config-path rustfmt.toml "$new/bindings.rs"
TMPDIR=$PWD/target emulator --features bindings --bin tiles -- kernels >"$new/tile_table.rs"
for file in bindings tile_table; do
  if [ "${1:-}" = --check ]; then
    diff -u src/launch/$file.rs "$new/$file.rs" || { echo "error: run scripts/bindings.sh: the kernels have changed" >&2; exit 1; }
  else
    cp "$new/$file.rs" src/launch/$file.rs
  fi
done
