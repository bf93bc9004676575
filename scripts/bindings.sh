#!/usr/bin/env bash
# Regenerates src/launch/bindings.rs from kernels/abi.h; with --check only says whether it has drifted.
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

new=$(mktemp)
trap 'rm -f "$new"' EXIT
cargo run -q --release -p candle-sam-lora-emulator --features bindings --bin bindings -- kernels/abi.h >"$new"
rustfmt --edition 2021 --config-path rustfmt.toml "$new"
if [ "${1:-}" = --check ]; then
  diff -u src/launch/bindings.rs "$new" || { echo "error: run scripts/bindings.sh: kernels/abi.h has changed" >&2; exit 1; }
else
  cp "$new" src/launch/bindings.rs
fi
