#!/usr/bin/env bash
# Layers import downward only:  reference | philox <- problem <- cpu, launch <- ops <- nn <- lora, sam <- train <- examples.
# Each line below names a layer and the modules of this crate it must not import.
set -euo pipefail
cd "$(dirname "$0")/.."

status=0
forbid() {
  local where=$1 modules=$2
  # shellcheck disable=SC2086
  if grep -rnE "(crate|candle_sam_lora)::($modules)\b" $where --include='*.rs'; then
    echo "error: $where must not import $modules" >&2
    status=1
  fi
}
forbid "src/philox.rs src/reference.rs src/error.rs src/device.rs" "problem|cpu|launch|ops|nn|lora|sam|train"
forbid "src/problem.rs src/files.rs src/hub" "cpu|launch|ops|nn|lora|sam|train"
forbid "src/cpu" "launch|ops|nn|lora|sam|train|files"
forbid "src/launch" "cpu|ops|nn|lora|sam|train|files|reference"
forbid "src/cuda" "cpu|ops|nn|lora|sam|train|files|reference"
forbid "src/ops" "nn|lora|sam|train|files|reference"
forbid "src/nn" "cuda|launch|lora|sam|train|reference"
forbid "src/lora" "cuda|launch|sam|train|cpu|reference"
forbid "src/sam" "cuda|launch|lora|train|cpu|reference"
forbid "src/train" "cuda|launch|cpu|reference"
exit $status
