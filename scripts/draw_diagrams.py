#!/usr/bin/env python3
"""Draws the diagrams of the documents, docs/images/*.svg. Numbers and names come from the files that hold them.

usage: draw_diagrams.py            writes them
       draw_diagrams.py --check    fails where a picture is not what this script draws
"""

import re
import sys
from html import escape
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
IMAGES = ROOT / "docs/images"
INK, FAINT, PAPER = "#1b2631", "#7b8a97", "#ffffff"
BLUE, RED, GREEN, GREY = "#aed6f1", "#f5b7b1", "#abebc6", "#e5e8ea"


class Drawing:
    def __init__(self, width, height):
        self.width, self.height, self.parts = width, height, []

    def box(self, x, y, width, height, fill=GREY, line=INK, dashed=False):
        dash = ' stroke-dasharray="4 3"' if dashed else ""
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
        self.parts.append(f'<rect {place} fill="{fill}" stroke="{line}"{dash}/>')

    def text(self, x, y, words, anchor="middle", size=13, colour=INK):
        at = f'x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-size="{size}" fill="{colour}"'
        self.parts.append(f"<text {at}>{escape(words)}</text>")

    def labelled(self, x, y, width, height, words, fill=GREY, size=13):
        self.box(x, y, width, height, fill)
        self.text(x + width / 2, y + height / 2 + size / 3, words, size=size)

    def line(self, x0, y0, x1, y1):
        self.parts.append(f'<line x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}" stroke="{INK}"/>')

    def arrow(self, x0, y0, x1, y1, colour=INK):
        ends = f'x1="{x0:g}" y1="{y0:g}" x2="{x1:g}" y2="{y1:g}"'
        self.parts.append(f'<line {ends} stroke="{colour}" stroke-width="1.5" marker-end="url(#head)"/>')

    def svg(self):
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        head = (
            '<defs><marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
            f'<path d="M0 0L8 4L0 8z" fill="{INK}"/></marker></defs>'
        )
        paper = f'<rect width="100%" height="100%" fill="{PAPER}"/>'
        parts = "\n".join([head, paper, *self.parts])
        return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">\n{parts}\n</svg>\n'


def layers():
    """The modules of src, a row a layer, from the script that checks them."""
    text = (ROOT / "scripts/check-layers.sh").read_text()
    rows = re.search(r'LAYERS = """\n(.*?)"""', text, re.S)[1].split("\n")[:-1]
    d = Drawing(560, 44 * len(rows) + 36)
    for index, names in enumerate(reversed(rows)):
        y, modules = 12 + 44 * index, names.split()
        width = 440 / len(modules)
        for place, name in enumerate(modules):
            d.labelled(12 + place * width, y, width - 6, 32, name, BLUE if name in ("ops", "cpu", "launch") else GREY)
    d.arrow(486, 16, 486, 44 * len(rows) - 4)
    d.text(500, 22 * len(rows) - 4, "imports", "start")
    d.text(12, d.height - 12, "blue: the operations, and the two engines below them", "start", 12, FAINT)
    return d


def windows():
    """Windows and their padding as addresses of one grid."""
    grid, side, cell = 64, 14, 4.4
    across = -(-grid // side)
    d = Drawing(700, 380)
    left, top, window = 20, 40, side * cell
    d.text(left, 26, f"a grid of {grid} x {grid} tokens, {across} x {across} windows of {side} x {side}", "start")
    for row in range(across):
        for column in range(across):
            d.box(left + column * window, top + row * window, window, window, GREY, FAINT, dashed=True)
    d.box(left, top, grid * cell, grid * cell, BLUE)
    for line in range(1, across):
        d.line(left + line * window, top, left + line * window, top + grid * cell)
        d.line(left, top + line * window, left + grid * cell, top + line * window)
    # The token (y, x) = (9, 5) of window (1, 2).
    y, x, i, j = 9, 5, 1, 2
    token_x, token_y = left + j * window + x * cell, top + i * window + y * cell
    d.box(left + j * window, top + i * window, window, window, GREEN)
    d.box(token_x, token_y, cell, cell, INK)
    d.arrow(392, 104, token_x + 2 * cell, token_y + cell / 2)
    d.text(396, 84, f"token ({y}, {x}) of window ({i}, {j})", "start")
    d.text(396, 106, f"is row ({side} i + y) {grid} + {side} j + x = {(side * i + y) * grid + side * j + x} of qkv:", "start")
    d.text(396, 128, "nothing is copied into windows or back.", "start")
    d.arrow(392, 232, left + 4.8 * window, top + 3.5 * window)
    d.text(396, 228, f"beyond the grid ({across * side} - {grid} = {across * side - grid} tokens)", "start")
    d.text(396, 250, "there is nothing to read: a padded token's", "start")
    d.text(396, 272, "q, k and v are the projections' biases.", "start")
    return d


def ring():
    """A block of the attention's forward on Hopper: a thread fills slots, two warpgroups empty them."""
    d = Drawing(760, 330)
    d.labelled(20, 40, 150, 60, "global memory", GREY)
    d.text(95, 120, "q, k, v, tables", size=12, colour=FAINT)
    d.labelled(230, 24, 150, 92, "", BLUE)
    d.text(305, 64, "producer")
    d.text(305, 84, "one thread, bulk copies", size=12)
    d.arrow(170, 70, 226, 70)
    names = ["table rows", "K 0", "K 1", "V 0"]
    for index, name in enumerate(names):
        x = 60 + 160 * index
        d.labelled(x, 170, 140, 40, name, GREEN)
        d.text(x + 70, 230, f"slot {index}: full | empty", size=12, colour=FAINT)
        d.arrow(305, 118, x + 70, 166)
    d.text(716, 195, ".. K 2, V 1", "middle", 12)
    for group, x in enumerate((130, 440)):
        d.labelled(x, 262, 190, 44, f"warpgroup {group}: 64 queries", RED)
        d.arrow(x + 95, 236, x + 95, 258)
    d.arrow(322, 278, 436, 278)
    d.arrow(438, 292, 324, 292)
    d.text(380, 270, "take turns", size=12)
    for line, words in enumerate(["The producer waits until a slot is empty;", "the copy's bytes make it full.",
                                  "A warpgroup waits until it is full,", "multiplies, and frees it."]):
        d.text(470, 40 + 22 * line, words, "start", 12, FAINT)
    return d


def step_memory():
    """The most memory of SAM's encoders on a GPU, batch 1, from the counts of the dry run."""
    rows = [line.split("\t") for line in (ROOT / "scripts/launch-budget.tsv").read_text().splitlines()]
    counted = {tuple(row[:3]): (float(row[3]), float(row[4])) for row in rows[1:] if row[3] != "-"}
    passes = [("inference", GREEN), ("checkpointed", BLUE), ("training", RED)]
    encoders = [("vit_b", "f32"), ("vit_b", "bf16"), ("vit_l", "bf16"), ("vit_h", "bf16")]
    d = Drawing(720, 56 + 78 * len(encoders))
    scale = 500 / max(counted[(*encoder, "training")][1] for encoder in encoders)
    for index, encoder in enumerate(encoders):
        y = 16 + 78 * index
        d.text(88, y + 38, f"ViT-{encoder[0][-1].upper()} {encoder[1]}", "end")
        for place, (name, fill) in enumerate(passes):
            weights, most = counted[(*encoder, name)]
            d.box(100, y + 21 * place, most * scale, 18, fill)
            d.box(100, y + 21 * place, weights * scale, 18, FAINT)
            d.text(106 + most * scale, y + 21 * place + 14, f"{most:,.0f} MiB {name}", "start", 12)
    d.text(100, d.height - 14, "grey: weights; the rest: activations, gradients, optimizer, at the peak", "start", 12, FAINT)
    return d


DRAWINGS = {"layers": layers, "windows": windows, "ring": ring, "step-memory": step_memory}


def main():
    stale = []
    for name, draw in DRAWINGS.items():
        path, drawn = IMAGES / f"{name}.svg", draw().svg()
        if sys.argv[1:] == ["--check"]:
            stale += [] if path.exists() and path.read_text() == drawn else [str(path.relative_to(ROOT))]
        elif len(sys.argv) == 1:
            path.write_text(drawn)
        else:
            sys.exit(__doc__)
    if stale:
        sys.exit(f"{', '.join(stale)}: not as scripts/draw_diagrams.py draws them; run it")


if __name__ == "__main__":
    main()
