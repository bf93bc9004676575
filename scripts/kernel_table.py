#!/usr/bin/env python3
"""The kernels' table: registers, spills and shared memory of each, and how many of its blocks a multiprocessor holds.

usage: kernel_table.py LOGS LAUNCHES BUDGET

LOGS: a folder of what `nvcc -Xptxas -v` printed, in files `*-sm_*.log`. LAUNCHES: what tests/launches.rs
wrote: threads and dynamic shared memory. BUDGET: scripts/kernel-budget.tsv. Fails where a kernel

- is over its budget;
- is launched by nobody;
- is in a file where `launch::file_of` does not look for it;
- fits no multiprocessor.
"""

import pathlib
import re
import sys
from typing import NamedTuple

# Limits of a multiprocessor: threads, and shared memory in bytes. Both have 65536 registers.
TARGETS = {"sm_80": (2048, 164 << 10), "sm_90a": (2048, 228 << 10)}
REGISTERS, MOST_BLOCKS, WARP = 65536, 32, 32
# The system's part of a block's shared memory.
RESERVED = 1024

HEADER = "kernel target registers stack spills static dynamic threads blocks".split()
ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
FUNCTION = re.compile(r"Function properties for (\w+)")
STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
STATIC = re.compile(r"(\d+) bytes smem")


class Compiled(NamedTuple):
    """Report of ptxas on a kernel; sizes in bytes."""

    kernel: str
    target: str
    registers: int
    stack: int
    spills: int
    static: int


def compiled(log):
    """The kernels of a log, in its order; what a function that was not inlined spills, its kernel does."""
    kernels, kernel, function = [], None, None
    for line in log.splitlines():
        if found := ENTRY.search(line):
            kernel = found.groups()
        elif found := FUNCTION.search(line):
            function = found[1]
        elif found := STACK.search(line):
            stack, stores, loads = map(int, found.groups())
            if function != kernel[0]:
                last = kernels[-1]
                kernels[-1] = last._replace(stack=last.stack + stack, spills=last.spills + stores + loads)
        elif found := USED.search(line):
            static = STATIC.search(line)
            kernels.append(Compiled(*kernel, int(found[1]), stack, stores + loads, int(static[1]) if static else 0))
    return kernels


def up(value, step):
    return -(-value // step) * step


def blocks(row, threads, dynamic):
    """Blocks of a kernel that a multiprocessor holds at once."""
    most_threads, shared = TARGETS[row.target]
    # A quarter of the registers belongs to a quarter of the warps, and they are given in units of 8 a thread.
    warps = 4 * (REGISTERS // 4 // (up(row.registers, 8) * WARP))
    memory = shared // up(row.static + dynamic + RESERVED, 128)
    return min(MOST_BLOCKS, most_threads // threads, warps * WARP // threads, memory)


def file_of(kernel, files):
    """Where src/launch/mod.rs says that a kernel is: the longest name of a file that its own begins with."""
    return max((file for file in files if f"{kernel}_".startswith(f"{file}_")), key=len, default=None)


def tab_separated(path):
    """The lines of a file, without comments, in fields."""
    lines = pathlib.Path(path).read_text().splitlines()
    return [line.split("\t") for line in lines if line and not line.startswith("#")]


def main(logs, launches, budget):
    launched = {
        kernel: (int(threads), int(dynamic)) for kernel, threads, dynamic in tab_separated(launches)
    }
    budgets = [(re.compile(pattern), int(most), int(spills)) for pattern, most, spills in tab_separated(budget)]
    of_file = [
        (path.name.partition("-sm_")[0], compiled(path.read_text())) for path in pathlib.Path(logs).rglob("*-sm_*.log")
    ]
    rows = sorted(row for _, kernels in of_file for row in kernels)
    files = {file for file, _ in of_file}
    table, bad = [HEADER], []
    for kernel, file in sorted({(row.kernel, file) for file, kernels in of_file for row in kernels}):
        if file_of(kernel, files) != file:
            bad.append(f"{kernel} is in {file}.cu, but looked for in {file_of(kernel, files)}.cu")
    for row in rows:
        name = f"{row.kernel} ({row.target})"
        fitting = [limits for pattern, *limits in budgets if pattern.fullmatch(row.kernel)]
        most_registers, most_spills = fitting[-1] if fitting else (255, 0)
        if row.registers > most_registers:
            bad.append(f"{name} uses {row.registers} registers, budget {most_registers}")
        if row.spills > most_spills:
            bad.append(f"{name} spills {row.spills} bytes, budget {most_spills}")
        if row.kernel not in launched:
            bad.append(f"{name} is not among the launches of tests/launches.rs")
            continue
        threads, dynamic = launched[row.kernel]
        held = blocks(row, threads, dynamic)
        if held == 0:
            bad.append(f"{name}: a block of {threads} threads and {row.static + dynamic} bytes fits nowhere")
        table.append([*row, dynamic, threads, held])
    widths = [max(len(str(row[column])) for row in table) for column in range(len(HEADER))]
    for row in table:
        cells = [str(cell).rjust(width) for cell, width in zip(row, widths)]
        cells[0] = str(row[0]).ljust(widths[0])
        print("  ".join(cells))
    if not rows:
        bad.append("ptxas said nothing of any kernel")
    for message in bad:
        print(f"error: {message}", file=sys.stderr)
    if bad:
        sys.exit(1)
    print(f"{len(rows)} kernels within their budgets")


if __name__ == "__main__":
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    main(*sys.argv[1:])
