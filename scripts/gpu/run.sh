#!/usr/bin/env bash
# Unpacks the GPU kit that bundle.sh made and runs it: see kit.py beside this, or `run.sh --help`.
#
# usage: [GPU_KIT=ARCHIVE] run.sh [arguments of kit.py]      (default: target/gpu-kit.tar.gz)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
archive=${GPU_KIT:-$here/../../target/gpu-kit.tar.gz}
if [ ! -e "$archive" ]; then
  echo "error: $archive: not found; scripts/gpu/bundle.sh makes it" >&2
  exit 1
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
tar -xzf "$archive" -C "$folder"
python3 "$here/kit.py" --kit "$folder/gpu-kit" "$@"
