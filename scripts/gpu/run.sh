#!/usr/bin/env bash
# Runs the GPU kit that bundle.sh packed: see kit.py beside this, or `run.sh --help`.
exec python3 "$(dirname "$0")/kit.py" "$@"
