#!/usr/bin/env bash
# Checks everything with the oldest versions of the direct dependencies that Cargo.toml allows. Choosing them is a
# nightly option, which the variable unlocks for cargo alone; the compiler stays as it is.
set -euo pipefail
cd "$(dirname "$0")/.."
target=$PWD/target/minimal-versions
copy=$(mktemp -d)
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard ':!tests/fixtures' | tar c --null -T - | tar x -C "$copy"
cd "$copy"
RUSTC_BOOTSTRAP=1 cargo update -Z direct-minimal-versions
cargo check --release --workspace --all-targets --features hub --target-dir "$target"
