#!/usr/bin/env bash
# Proves that the page of every public item has an example, or a link to one that is called "Example".
#
# It reads what `cargo doc` wrote. Pages of items that are gone stay there until `cargo clean --doc`.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 - <<'PYTHON'
import re
import sys
from pathlib import Path

ROOT = Path("target/doc/candle_sam_lora")
PAGE = re.compile(r"(struct|enum|union|fn|trait|macro|constant|static|type)\.\w+\.html")
# Traits of other crates follow, with examples of their own.
FOREIGN = re.compile(r'<h2 id="(trait|synthetic|blanket)-implementations"')
EXAMPLE = re.compile(r'<pre class="rust rust-example-rendered"|>Example</a>')

pages = {path: path.read_text() for path in sorted(ROOT.rglob("*.html")) if PAGE.fullmatch(path.name)}
# A page at an item's private path leads to its public one.
pages = {path: text for path, text in pages.items() if "<title>Redirection</title>" not in text}
without = [path for path, text in pages.items() if not EXAMPLE.search(FOREIGN.split(text, maxsplit=1)[0])]
for path in without:
    print(f"{path}: no example, and no link to one: /// [Example](path::of::an_item_that_has_one)")
if not pages:
    print(f"{ROOT}: no pages; run cargo doc first")
if without or not pages:
    sys.exit(1)
print(f"{len(pages)} items have an example or a link to one")
PYTHON
