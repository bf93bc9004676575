#!/usr/bin/env bash
# Layers import downward only:  reference | philox <- problem <- cpu, launch <- driver <- ops <- nn <- lora, sam <- train <- examples.
# `cuda`, the public face of driver, launch and ops, is for users alone.
# Each line below names a layer and the modules of this crate it must not import.
set -euo pipefail
cd "$(dirname "$0")/.."

status=0
forbid() {
  local where=$1 modules=$2 path file found
  for path in $where; do
    [ -e "$path" ] || { echo "error: there is no $path" >&2; status=1; continue; }
    while read -r file; do
      # Without comments, and on one line: a group of imports may be on several.
      found=$(grep -vE '^ *//' "$file" | tr '\n' ' ' |
        grep -oE "(crate|candle_sam_lora)::(\{[^;]*\b)?($modules)\b" || true)
      [ -z "$found" ] || { echo "error: $file must not import $modules: $found" >&2; status=1; }
    done < <(find "$path" -name '*.rs')
  done
}
forbid "src/philox.rs src/reference.rs src/error.rs src/device.rs src/file_kind.rs" "cuda|problem|cpu|launch|ops|nn|lora|sam|train"
forbid "src/problem.rs src/files.rs src/hub" "cuda|driver|cpu|launch|ops|nn|lora|sam|train"
forbid "src/cpu" "cuda|driver|launch|ops|nn|lora|sam|train|files"
forbid "src/launch" "cuda|driver|cpu|ops|nn|lora|sam|train|files|reference"
forbid "src/cuda" "cuda|cpu|ops|nn|lora|sam|train|files|reference"
forbid "src/ops" "cuda|nn|lora|sam|train|files|reference"
forbid "src/nn" "cuda|driver|launch|lora|sam|train|reference"
forbid "src/lora" "cuda|driver|launch|sam|train|cpu|reference"
forbid "src/sam" "cuda|driver|launch|lora|train|cpu|reference"
forbid "src/train" "cuda|driver|launch|cpu|reference"
exit $status
