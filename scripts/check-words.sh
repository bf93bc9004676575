#!/usr/bin/env bash
# Counts the sentences in comments, docstrings and documents that open with "What", "Of" or "Whose", and those of more
# than 25 words. Each folder has a budget of both, which may only fall. A code span, a path or a formula is one word.
#
#   scripts/check-words.sh            fails where a folder is over its budget, and lists that folder's sentences
#   scripts/check-words.sh FOLDER     lists the sentences of one row of the table
set -euo pipefail
cd "$(dirname "$0")/.."
exec python3 - "$@" <<'PYTHON'
import re
import subprocess
import sys
from pathlib import Path

# A file counts for the longest prefix of its path; documentation of public items of `src/` has a row of its own.
BUDGETS = {
    # folder: (opening with What, Of or Whose, long)
    "src/": (0, 0),
    "src/ (public)": (0, 0),
    "src/cli/": (0, 0),
    "kernels/": (0, 0),
    "emulator/": (0, 0),
    "build": (0, 0),
    "tests/": (0, 0),
    "tests/program/": (0, 0),
    "benches/": (0, 0),
    "examples/": (0, 0),
    "fuzz/": (0, 0),
    "scripts/": (0, 0),
    "docs/": (0, 0),
    "README.md": (0, 0),
    "*.md": (0, 0),
}
MOST_WORDS = 25
GENERATED = "src/launch/bindings.rs"  # from kernels/abi.h
C_LIKE = r'(?P<comment>//[^\n]*|/\*.*?\*/)|b?r(#*)".*?"\2|b?"(?:\\.|[^"\\])*"|b?\'(?:\\.|[^\'\\])\''
DOCSTRING = r'(?:(?:\A|(?<=:\n)|(?<=python3\n)) *"""(?!").*?""")'
SCRIPT = rf'(?P<comment>(?<![^\s])#[^\n]*|{DOCSTRING})|""".*?"""|"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\''
COMMENTS = dict.fromkeys((".rs", ".cu", ".cuh", ".h", ".cpp"), C_LIKE) | {".py": SCRIPT, ".sh": SCRIPT, ".md": r"(?P<comment>.+)"}
MARK = re.compile(r'\s*(//[/!]?|/\*|\*(?!\*)|#|"""|)(.*?)(?:\*/|""")?')
ONE_WORD = re.compile(r"``.+?``|`[^`]+`|\]\([^)]*\)")
FORMULA = re.compile(r"\S+(?: (?:[-+*/=<>]+|x) \S+)+")
ITEM = re.compile(r"^\s*(?:[-*+]|\d+\.)\s+")
LABEL = re.compile(r"\[[^\]]+\]: \S+$")  # where a link leads
PUBLIC_ITEM = re.compile(r"(?:\s*///[^\n]*|\s*#\[[^\n]*)*\s*pub ")


def marked_lines(path, text):
    """The lines of comments: their numbers, the mark before each, and the rest."""
    for match in re.finditer(COMMENTS[path.suffix], text, re.S):
        first, code = text.count("\n", 0, match.start()) + 1, text[: match.start()].rpartition("\n")[2].strip()
        for number, line in enumerate((match["comment"] or "").split("\n"), first):
            mark, rest = ("", line) if path.suffix == ".md" else MARK.fullmatch(line).groups()
            is_public = mark == "//!" or mark == "///" and PUBLIC_ITEM.match(text, match.end())
            yield number, (mark.strip('"'), bool(is_public), code and number), rest


def sentences(path, text):
    """Each sentence with its line, and whether it is public documentation."""
    paragraphs, last, fenced = [], None, False
    for number, mark, line in marked_lines(path, text):
        fence = line.lstrip().startswith("```")
        fenced ^= fence
        is_prose = line.strip() and not fence and not fenced and not (line.lstrip().startswith(("|", "#", "<")) or LABEL.match(line))
        if not is_prose or ITEM.match(line) or last != (number - 1, mark):
            paragraphs.append((mark, []))
        if is_prose:
            paragraphs[-1][1].append((number, ITEM.sub("", line).strip() + " "))
        last = (number, mark)
    for (_, is_public, _), lines in paragraphs:
        numbers, prose = [number for number, line in lines for _ in line], "".join(line for _, line in lines)
        # As long as the prose, so that places in one are places in the other.
        hidden, start = ONE_WORD.sub(lambda match: "`" + "_" * (len(match[0]) - 2) + "`", prose), 0
        for end in re.finditer(r"[.!?][)\"*_]*\s+(?=[A-Z`\[(\"*])|$", hidden):
            if hidden[start : end.end()].strip():
                yield numbers[start], is_public, prose[start : end.end()].strip(), hidden[start : end.end()]
            start = end.end()


found = {folder: ([], []) for folder in BUDGETS}
for path in map(Path, subprocess.check_output(["git", "ls-files"], text=True).splitlines()):
    folders = [row for row in BUDGETS if str(path).startswith(row) or row == "*.md" and path.suffix == ".md"]
    if not folders or str(path) == GENERATED or path.suffix not in COMMENTS:
        continue
    folder = max(folders, key=lambda row: (row != "*.md", len(row)))
    for line, is_public, sentence, hidden in sentences(path, path.read_text()):
        opening, long = found["src/ (public)" if is_public and folder == "src/" else folder]
        if re.match(r"[(\"*]*(?:What|Of|Whose)\b", hidden):
            opening.append(f"{path}:{line}: {sentence}")
        if len(re.findall(r"\S*\w\S*", FORMULA.sub("formula", hidden))) > MOST_WORDS:
            long.append(f"{path}:{line}: {sentence}")
failed = False
for folder, budgets in BUDGETS.items():
    for kind, budget, told in zip(("open with What, Of or Whose", "are long"), budgets, found[folder]):
        if told and (len(told) > budget or folder in sys.argv[1:]):
            print("\n".join(told))
        if len(told) != budget:
            more = f"error: at most {budget} may" if len(told) > budget else f"the budget can fall by {budget - len(told)}"
            print(f"{folder}: {len(told)} sentences {kind}: {more}")
        failed |= len(told) > budget
sys.exit(failed)
PYTHON
