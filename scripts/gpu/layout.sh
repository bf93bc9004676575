#!/usr/bin/env bash
# Makes the folder that scripts/gpu/kit.py runs: the binary under the names of all its programs, its version, and how it was
# built.
#
# usage: layout.sh BINARY FOLDER WHAT_IT_WAS_BUILT_WITH
set -euo pipefail
binary=$(realpath "$1") folder=$2 with=$3
cd "$(dirname "$0")/../.."
mkdir -p "$folder"
cp "$binary" "$folder/gpu"
for program in cases finetune headline smoke; do ln -sf gpu "$folder/$program"; done
git describe --always --dirty >"$folder/VERSION"
cat >"$folder/BUILD" <<END
Built with $with; $(rustc --version); needs glibc $(objdump -T "$binary" |
  grep -o 'GLIBC_[0-9.]*' | sort -Vu | tail -1 | cut -d_ -f2) or newer.
END
