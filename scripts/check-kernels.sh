#!/usr/bin/env bash
# Compiles every kernel with nvcc, warnings being errors, for sm_80, sm_90a and as PTX; needs no GPU. Prints the table of
# registers, spills, shared memory and occupancy (scripts/kernel_table.py), and fails where a kernel is over its budget in
# scripts/kernel-budget.tsv.
set -euo pipefail
cd "$(dirname "$0")/.."

# As build.rs compiles them: flags meant for all of a user's CUDA code would change the kernels.
unset NVCC_APPEND_FLAGS NVCC_PREPEND_FLAGS
nvcc=$(scripts/nvcc.sh)
export nvcc out=target/check-kernels
rm -rf "$out"
mkdir -p "$out"
"$nvcc" --version | sed -n 's/^Cuda compilation tools, /nvcc: /p'

compile() {
  local source=$1 target=$2 status=0
  local name=$out/${source%.cu}-$target
  local log=$name.log
  mkdir -p "$(dirname "$name")"
  case $target in
    ptx) "$nvcc" -std=c++20 -O3 -Ikernels -Werror all-warnings -arch=compute_80 --ptx -o "$name.ptx" "$source" >"$log" 2>&1 || status=$? ;;
    *) "$nvcc" -std=c++20 -O3 -Ikernels -Werror all-warnings -Xptxas -v -arch="$target" --cubin -o "$name.cubin" "$source" >"$log" 2>&1 || status=$? ;;
  esac
  if [ "$status" != 0 ]; then
    echo "error: $source for $target:" >&2
    cat "$log" >&2
  fi
  return "$status"
}
export -f compile

# Files under kernels/sm90/ are for sm_90a alone.
{
  # Those of the tests too: they use every instruction of ptx.cuh.
  for source in kernels/*.cu tests/kernels/*.cu; do printf '%s\n' "$source sm_80" "$source sm_90a" "$source ptx"; done
  for source in kernels/sm90/*.cu tests/kernels/sm90/*.cu; do [ -e "$source" ] && echo "$source sm_90a"; done
  true
} | xargs -P "$(nproc)" -L 1 bash -c 'compile "$1" "$2" || exit 255' _

# Those are there for Hopper's products and bulk copies, some to wait themselves for the kernel before (ACQBULK); the
# windows', which are bound by memory, for its shared memory.
for source in kernels/sm90/*.cu; do
  case $source in
    *_window_*) instructions="HMMA LDGSTS" ;;
    */projection_*) instructions="HGMMA UTMALDG UTMALDG.2D.MULTICAST ACQBULK" ;;
    *) instructions="HGMMA UTMALDG" ;;
  esac
  sass=$("$(dirname "$nvcc")/cuobjdump" --dump-sass "$out/${source%.cu}-sm_90a.cubin")
  for instruction in $instructions; do
    count=$(grep -c "$instruction" <<<"$sass" || true)
    echo "$source: $count x $instruction"
    [ "$count" -gt 0 ] || { echo "error: $source has no $instruction" >&2; exit 1; }
  done
done

# The dynamic shared memory is what the launch code asks for.
CANDLE_SAM_LORA_LAUNCHES=$PWD/$out/launches.tsv cargo test -q --release --test launches
python3 scripts/kernel_table.py "$out/kernels" "$out/launches.tsv" scripts/kernel-budget.tsv
