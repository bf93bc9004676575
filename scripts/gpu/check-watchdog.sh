#!/usr/bin/env bash
# A kernel that never ends, on the stand-in for the driver: the watchdog has to end the process and name the test.
set -euo pipefail
cd "$(dirname "$0")/../.."
said=$(EMULATED_HANG=layer_norm_fwd CANDLE_SAM_LORA_WATCHDOG=5 timeout 900 \
  scripts/emulated-gpu.sh "values layer_norm [1, 1] f32" 2>&1) && status=0 || status=$?
if [ "$status" = 0 ] || [ "$status" = 124 ] ||
  ! grep -q 'values layer_norm \[1, 1\] f32 (Native kernels): no progress for [0-9]* s, the GPU hangs' <<<"$said"; then
  printf '%s\nerror: expected the watchdog to end the process, got status %s\n' "$said" "$status" >&2
  exit 1
fi
