#!/usr/bin/env bash
# Builds tests/gpu in the environment that is there, and prints the path of the binary.
set -euo pipefail
cd "$(dirname "$0")/../.."
cargo test --release --features cuda --test gpu --no-run --message-format=json-render-diagnostics |
  python3 -c 'import json, sys
for line in sys.stdin:
    message = json.loads(line)
    if message.get("executable") and message["target"]["name"] == "gpu":
        print(message["executable"])'
