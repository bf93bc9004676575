#!/usr/bin/env bash
# Runs the GPU kit that bundle.sh packed: tests, compute-sanitizer on the small cases, benchmarks, PyTorch as a peer.
#
# usage: run.sh [RESULTS]      (default: results) ; writes RESULTS/results.json, RESULTS/results.md and the logs
#
# What is not there (compute-sanitizer, torch) is left out, and the report says so. Without a GPU it says that and ends
# well; the exit status is 1 if a test failed or a sanitizer complained.
set -uo pipefail
cd "$(dirname "$0")"
results=${1:-results}
mkdir -p "$results"
rm -f "$results"/*.jsonl "$results"/*.log "$results"/*.status

# CUDA's libraries: the toolkit's, or those that came with PyTorch.
torch_libraries=$(python3 -c '
import os, nvidia
print(":".join(p for base in nvidia.__path__ for d in ("cu13", "cublas", "curand", "cuda_runtime", "cuda_nvrtc")
               if os.path.isdir(p := os.path.join(base, d, "lib"))))' 2>/dev/null || true)
export LD_LIBRARY_PATH="/usr/local/cuda/lib64${torch_libraries:+:$torch_libraries}${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
export CANDLE_SAM_LORA_FIXTURES=$PWD/tests/fixtures

# Without a device the binary says so and passes; so does this.
probe=$(./gpu no-such-test 2>&1) || { echo "error: the binary does not start: $probe" >&2; exit 1; }
if grep -q '^skipped' <<<"$probe"; then
  echo "$probe"
  exit 0
fi
export CANDLE_SAM_LORA_REQUIRE_GPU=1

# step NAME OUTPUT COMMAND..: its output, and how it ended, for the report.
step() {
  local name=$1 output=$2 status=0
  shift 2
  printf '== %s (%s)\n' "$name" "$(date -u +%H:%M:%S)"
  "$@" >"$results/$output" 2>"$results/$name.log" || status=$?
  echo "$status" >"$results/$name.status"
  [ "$status" = 0 ] || { echo "   failed with status $status"; tail -n 20 "$results/$name.log"; }
}

nvidia-smi --query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm --format=csv,noheader \
  >"$results/device.log" 2>&1 || true

step tests tests.jsonl ./gpu --test --format json

sanitizer=$(command -v compute-sanitizer || ls /usr/local/cuda/bin/compute-sanitizer 2>/dev/null || true)
if [ -n "$sanitizer" ]; then
  # The small cases once each: a sanitizer is up to a hundred times slower.
  for tool in memcheck racecheck initcheck synccheck; do
    step "$tool" "$tool.out" "$sanitizer" --tool "$tool" --error-exitcode 99 \
      ./gpu --test gradients --skip '768' --skip '1280' --skip '20x20' --skip '128'
  done
fi

step bench bench.jsonl ./gpu --bench --format json
if python3 -c 'import torch; assert torch.cuda.is_available()' 2>/dev/null; then
  step peers peers.jsonl python3 peers.py
fi

python3 report.py "$results"
