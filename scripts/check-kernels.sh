#!/usr/bin/env bash
# Compiles every kernel with nvcc, warnings being errors, for sm_80, sm_90a and as PTX; needs no GPU. Prints each
# kernel's registers, stack, spills and barriers as ptxas gives them, and fails where one is over its budget in
# scripts/kernel-budget.tsv. Dynamic shared memory is the launch's business (kernels/abi.h) and not in the table.
set -euo pipefail
cd "$(dirname "$0")/.."

nvcc=$(scripts/nvcc.sh)
export nvcc out=target/check-kernels
mkdir -p "$out"
rm -f "$out"/*
"$nvcc" --version | sed -n 's/^Cuda compilation tools, /nvcc: /p'

compile() {
  local source=$1 target=$2 name log status=0
  name=$(basename "$source" .cu)-$target
  log=$out/$name.log
  case $target in
    ptx) "$nvcc" -std=c++20 -O3 -Ikernels -Werror all-warnings -arch=compute_80 --ptx -o "$out/$name.ptx" "$source" >"$log" 2>&1 || status=$? ;;
    *) "$nvcc" -std=c++20 -O3 -Ikernels -Werror all-warnings -Xptxas -v -arch="$target" --cubin -o "$out/$name.cubin" "$source" >"$log" 2>&1 || status=$? ;;
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

cat "$out"/*-sm_*.log | awk -v budget=scripts/kernel-budget.tsv '
  BEGIN {
    while ((getline line < budget) > 0) {
      if (line ~ /^#/ || line == "") continue
      split(line, field, "\t")
      pattern[++patterns] = field[1]; most_registers[patterns] = field[2]; most_spills[patterns] = field[3]
    }
    format = "%-44s %-7s %9s %6s %12s %12s %8s\n"
    sorted = "sort"
    printf format, "kernel", "target", "registers", "stack", "spill stores", "spill loads", "barriers"
    fflush()
  }
  /Compiling entry function/ { split($0, part, "\047"); kernel = part[2]; target = part[4] }
  /bytes stack frame/ { stack = $1; stores = $5; loads = $9 }
  /Used [0-9]+ registers/ {
    for (i = 1; i < NF; ++i) {
      if ($i == "Used") registers = $(i + 1)
      if ($i == "used") barriers = $(i + 1)
    }
    printf format, kernel, target, registers, stack, stores, loads, barriers | sorted
    count++
    limit = 255; spills = 0
    for (i = 1; i <= patterns; ++i) if (kernel ~ "^" pattern[i] "$") { limit = most_registers[i]; spills = most_spills[i] }
    if (registers > limit) bad = bad sprintf("error: %s (%s) uses %d registers, budget %d\n", kernel, target, registers, limit)
    if (stores + loads > spills) bad = bad sprintf("error: %s (%s) spills %d bytes, budget %d\n", kernel, target, stores + loads, spills)
  }
  END {
    close(sorted)
    if (count == 0) bad = "error: ptxas said nothing of any kernel\n"
    if (bad != "") { printf "%s", bad > "/dev/stderr"; exit 1 }
    printf "%d kernels within their budgets\n", count
  }'
