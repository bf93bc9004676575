#!/usr/bin/env bash
# The sources of the kernels, and the comments of Rust apart from tables, have lines of at most 120 columns.
set -euo pipefail
cd "$(dirname "$0")/.."
{ find kernels -type f; git ls-files '*.rs' | grep -v '^src/launch/bindings.rs$'; } | xargs awk '
  (/^ *\/\// && !/^ *\/\/[\/!] \|/ || FILENAME ~ /^kernels/) && length($0) > 120 {
    printf "error: %s:%d: %d columns, at most 120\n", FILENAME, FNR, length($0) > "/dev/stderr"; long = 1
  }
  END { exit long }'
