#!/usr/bin/env bash
# Proves from the imports in src that the layers below import downward only, and that no files import each other in a circle.
#
#   scripts/check-layers.sh           tells each fault, and the circles that still stand
#   scripts/check-layers.sh FILE      the files that FILE imports, and the names it takes
#
# File A imports file B if A's code, its unit tests aside, names an item that B defines. A name that a module only hands on,
# by `pub use` or `mod`, counts for the file that defines it. So a child may use its parent's items and the parent the
# child's, but not both.
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 - "$@" <<'PYTHON'
import re
import sys
from pathlib import Path

# Lowest first. A module imports modules of the rows before its own.
LAYERS = """
error philox file_kind weights_file guide
problem files hub
cpu launch
driver
device ops
nn
lora sam
train
cli
testing main
"""
# Modules that only some of the rows above them may import.
IMPORTERS = {
    "files": {"nn", "lora", "sam", "train", "cli"},
    "cpu": {"ops", "nn"},
    "launch": {"driver", "ops"},
    "driver": {"device", "ops"},
}
# Circles that still stand: a file of each, and what ties it. They are told, and no other may come.
STANDING = {}
ROWS = {name: row for row, names in enumerate(LAYERS.split("\n")) for name in names.split()}
# Where files may not import each other in a circle; the rows are for the first.
SOURCES = [Path(path) for path in ("src", "emulator/src", "emulator/driver/src")]
NOT_CODE = re.compile(r'//[^\n]*|/\*.*?\*/|b?r(#*)".*?"\1|b?"(?:\\.|[^"\\])*"|b?\'(?:\\.|[^\'\\])\'', re.S)
USE = re.compile(r"(?P<pub>pub(?:\([^)]*\))?\s+)?\buse\s+(?P<tree>[^;]+);")
PATH = re.compile(r"(?<![\w:])\w+(?:::\w+)+")


def without_tests(text):
    while test := re.search(r"#\[cfg\(test\)\]\s*(?:pub(?:\([^)]*\))?\s+)?mod \w+ \{", text):
        depth, end = 1, test.end()
        while depth:
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        text = text[: test.start()] + text[end:]
    return text


def leaves(tree):
    """The paths of a tree of imports, each with the name it gets."""
    tree = tree.strip()
    if brace := re.fullmatch(r"(.*?)\{(.*)\}", tree, re.S):
        depth, parts = 0, [""]
        for c in brace[2]:
            depth += {"{": 1, "}": -1}.get(c, 0)
            if c == "," and depth == 0:
                parts.append("")
            else:
                parts[-1] += c
        prefix = brace[1].strip()
        for part in filter(str.strip, parts):
            for path, name in leaves(part):
                module = prefix.removesuffix("::")
                yield (module, module.split("::")[-1] if name == "self" else name) if path == "self" else (prefix + path, name)
        return
    path, _, name = (word.strip() for word in tree.partition(" as "))
    yield path, name or path.split("::")[-1]


class Module:
    """A file: what it imports by `use`, and its other code."""

    def __init__(self, root, path):
        self.path, parts = path, list(path.relative_to(root).with_suffix("").parts)
        if parts[-1] in ("mod", "lib"):
            parts.pop()
        if parts[:1] == ["cuda"]:
            parts[0] = "driver"
        self.name, raw = tuple(parts), path.read_text()
        text = without_tests(NOT_CODE.sub(" ", raw))
        # Files of another folder, which `#[path]` brings in.
        self.elsewhere = set(re.findall(r'#\[path = "[^"]*"\]\s*(?:pub(?:\([^)]*\))? )?mod (\w+);', raw))
        self.macros = re.findall(r"#\[macro_export\]\s*macro_rules!\s*(\w+)", text)
        self.uses = [(bool(m["pub"]), *leaf) for m in USE.finditer(text) for leaf in leaves(m["tree"])]
        self.names = {name: path for _, path, name in self.uses}
        self.defined = set(re.findall(r"\b(?:fn|struct|enum|trait|type|const|static)\s+(\w+)", text))
        self.offered = self.defined | set(self.names)
        self.code = USE.sub(" ", text)


def find(here, path, seen=()):
    """The module that defines what `path`, as `here` writes it, names; and whether that is the module itself."""
    words = path.replace("$", "").split("::")
    if words[0] == "crate":
        at, words = (), words[1:]
        if words and words[0] in MACROS:
            return MACROS[words[0]], False
    elif words[0] in ("self", "super"):
        at = here
        while words and words[0] in ("self", "super"):
            at, words = (at[:-1] if words[0] == "super" else at), words[1:]
    elif here + (words[0],) in MODULES or words[0] in MODULES[here].names:
        at = here
    else:
        return None, False
    while words:
        # A function may have the name of its module: `dropout::dropout`, handed on, is the function.
        is_item = len(words) == 1 and words[0] in MODULES[at].names
        if at + (words[0],) in MODULES and not is_item:
            at, words = at + (words[0],), words[1:]
            continue
        if words[0] in MODULES[at].elsewhere:
            return None, False
        step = (at, words[0])
        if step in seen:
            return at, False
        module = MODULES[at]
        if words[0] in module.names:
            rest = "::".join([module.names[words[0]], *words[1:]])
            found = find(at, rest, (*seen, step))
            return found if found[0] is not None else (None, False)
        for _, target, name in module.uses:
            if name == "*":
                found = find(at, target.removesuffix("::*"), (*seen, step))
                if found[1] and words[0] in MODULES[found[0]].offered:
                    return find(found[0], f"self::{words[0]}", (*seen, step))
        return at, False
    return at, True


def imports(module):
    """The files that a file imports, with the names it takes."""
    found, words = {}, set(re.findall(r"\w+", module.code))
    paths = []
    for path, name in ((path, name) for hands_on, path, name in module.uses if not hands_on):
        inside, _, last = path.rpartition("::")
        at, is_module = find(module.name, inside) if inside else (None, False)
        # Imported for the module of that name alone, if the function is never named.
        for_module = is_module and at + (last,) in MODULES and not re.search(rf"(?<![:.\w]){name}\b(?!\s*::)", module.code)
        if for_module:
            continue
        if path.endswith("::*"):
            glob, is_module = find(module.name, path.removesuffix("::*"))
            names = (MODULES[glob].offered & words) - module.offered if is_module else ()
            paths += [path.removesuffix("*") + name for name in sorted(names)]
        else:
            paths.append(path)
    for path in [*paths, *PATH.findall(module.code)]:
        target, is_module = find(module.name, path)
        # A module's name alone takes nothing from it; what follows is in a path of the code.
        if target is None or target == module.name or is_module:
            continue
        found.setdefault(target, set()).add(path.split("::")[-1])
    return found


def circles(arrows):
    """The strongly connected components of more than one file (Tarjan)."""
    index, low, stack, found = {}, {}, [], []

    def visit(node):
        index[node] = low[node] = len(index)
        stack.append(node)
        for target in arrows[node]:
            if target not in index:
                visit(target)
            if target in stack:
                low[node] = min(low[node], low[target])
        if low[node] == index[node]:
            at = stack.index(node)
            if len(stack) - at > 1:
                found.append(stack[at:])
            del stack[at:]

    for node in arrows:
        if node not in index:
            visit(node)
    return found


def upward(arrows):
    """The imports that the rows forbid."""
    for name, targets in arrows.items():
        for target, taken in targets.items():
            if not name or name[:1] == target[:1]:
                continue
            importer, imported = name[0], target[0] if target else "lib"
            downward = ROWS.get(imported, len(ROWS)) < ROWS.get(importer, -1)
            if not downward or importer not in IMPORTERS.get(imported, {importer}):
                yield f"{MODULES[name].path} must not import {imported}: {', '.join(sorted(taken))}"


faults = []
for root in SOURCES:
    MODULES = {module.name: module for module in (Module(root, path) for path in sorted(root.rglob("*.rs")))}
    MACROS = {macro: module.name for module in MODULES.values() for macro in module.macros}
    arrows = {name: imports(module) for name, module in MODULES.items()}
    for name, targets in arrows.items():
        if sys.argv[1:] == [str(MODULES[name].path)]:
            print("\n".join(f"{MODULES[to].path}: {', '.join(sorted(taken))}" for to, taken in targets.items()))
    if root == SOURCES[0]:
        faults += upward(arrows)
        unknown = {name[0] for name in MODULES if name} - set(ROWS)
        faults += [f"the module {name} is on no row of this script" for name in unknown]
    for circle in circles(arrows):
        files = {str(MODULES[name].path) for name in circle}
        if standing := sorted(files & set(STANDING)):
            print(f"standing: a circle of {len(circle)} files through {standing[0]}: {STANDING[standing[0]]}")
            continue
        faults.append(f"files that import each other: {', '.join(sorted(files))}")
        for name in circle:
            for target in (target for target in arrows[name] if target in circle):
                taken = ", ".join(sorted(arrows[name][target]))
                faults.append(f"  {MODULES[name].path} -> {MODULES[target].path}: {taken}")
if faults:
    sys.exit("\n".join(f"error: {fault}" for fault in faults))
PYTHON
