#!/usr/bin/env bash
# Compiles every kernel with each compiler that scripts/nvcc.sh names, warnings being errors, for sm_80 and sm_90a; needs no
# GPU. For each it prints the table of registers, spills, shared memory and occupancy (scripts/kernel_table.py), and fails
# where a kernel is over its budget in scripts/kernel-budget.tsv. Then it reads the machine code of all
# (scripts/check-sass.py), against the budgets in scripts/sass-budget.tsv.
#
# usage: check-kernels.sh [--write-budget]      (makes scripts/sass-budget.tsv anew)
set -euo pipefail
shopt -s nullglob
cd "$(dirname "$0")/.."
budget=--budget
[ "${1:-}" != --write-budget ] || budget=--write

# As build.rs compiles them: flags meant for all of a user's CUDA code would change the kernels.
unset NVCC_APPEND_FLAGS NVCC_PREPEND_FLAGS
out=target/check-kernels
rm -rf "$out"
mkdir -p "$out"

# family SOURCE: the first part of the names of its kernels, as build/family.rs says.
family() {
  local folder=${1%/*} suffix=
  local stem=${1##*/}
  if [ "${folder##*/}" = sm90 ]; then suffix=_sm90 folder=${folder%/*}; fi
  stem=${stem%.cu} folder=${folder##*/}
  if [ "$folder" != "$stem" ]; then stem=${folder}_$stem; fi
  echo "$stem$suffix"
}

# compile NVCC FOLDER SOURCE TARGET [FLAG..]: .cubin, .ptx and .log of FOLDER/kernels/FAMILY-TARGET, for a test FOLDER/tests/..
compile() {
  local nvcc=$1 source=$3 target=$4 status=0 name
  name=$2/${source%%/*}/$(family "$source")-$target
  mkdir -p "$name"
  "$nvcc" -std=c++20 -O3 -Ikernels -Werror all-warnings -Xptxas -v -arch="$target" --cubin --keep --keep-dir "$name" \
    "${@:5}" -o "$name.cubin" "$source" >"$name.log" 2>&1 || status=$?
  if [ "$status" != 0 ]; then
    echo "error: $nvcc of $source for $target:" >&2
    cat "$name.log" >&2
  else
    mv "$name"/*.ptx "$name.ptx"
  fi
  rm -r "$name"
  return "$status"
}
export -f compile family

# The dynamic shared memory is what the launch code asks for.
CANDLE_SAM_LORA_LAUNCHES=$PWD/$out/launches.tsv cargo test -q --release --test launches

compilers=$(scripts/nvcc.sh)
folders=()
for nvcc in $compilers; do
  release=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\),.*/\1/p')
  printf '\nCUDA %s: %s\n' "$release" "$nvcc"
  # Files in a folder sm90 are for sm_90a alone. Those of the tests too: they use every instruction of ptx.cuh.
  {
    for source in kernels/*/sm90/*.cu tests/kernels/sm90/*.cu; do echo "$source sm_90a"; done
    for source in kernels/*/*.cu tests/kernels/*.cu; do printf '%s\n' "$source sm_80" "$source sm_90a"; done
  } | xargs -P "$(nproc)" -L 1 bash -c 'compile "$@" || exit 255' _ "$nvcc" "$out/$release"
  python3 scripts/kernel_table.py "$out/$release/kernels" "$out/launches.tsv" scripts/kernel-budget.tsv

  # The older compilers are known to get this wrong, and it has to be found.
  if [ "$(printf '%s\n' 13.1 "$release" | sort -V | head -1)" != 13.1 ]; then
    compile "$nvcc" "$out/wrong/$release" tests/sass/overwritten_keys.cu sm_90a
  fi
  mkdir -p "$out/sass/$release"
  folders+=("$out/sass/$release")
  ln "$out/$release"/kernels/*-sm_80.* "$out/$release"/kernels/*_sm90-sm_90a.* "$out/sass/$release"
  # That of the newest one reads what all wrote.
  if [ -x "$(dirname "$nvcc")/nvdisasm" ]; then nvdisasm=$(dirname "$nvcc")/nvdisasm; fi
done
: "${nvdisasm:?is beside none of these nvcc, and is needed to read the machine code}"

printf '\nmachine code\n'
python3 tests/sass/test_check_sass.py --nvdisasm "$nvdisasm" "$out/wrong"/*
python3 tests/sass/test_scheduler_model.py
python3 scripts/check-sass.py --nvdisasm "$nvdisasm" "$budget" scripts/sass-budget.tsv "${folders[@]}"
