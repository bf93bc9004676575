#!/usr/bin/env python3
"""Checks the machine code that nvcc made of the kernels; needs no GPU.

The compiler is not trusted: ptxas has given the registers of wgmma's left operands to other values, and made wgmma wait for
itself.

usage: check-sass.py [--nvdisasm PROGRAM] [--budget TABLE | --write TABLE] FOLDER..

FOLDER: what scripts/check-kernels.sh left of one compiler, and is named by its release: NAME-TARGET.cubin, .ptx and .log of
each file. TABLE: scripts/sass-budget.tsv, which --write makes anew. It is an error if

- a register of a left operand of wgmma comes from another kind or number of instructions than in the PTX;
- such a register comes from within the loop where the PTX has it from before the loop;
- an instruction touches an accumulator of wgmma, or writes a left operand, before wgmma is done with it;
- a warpgroup names registers that it does not have after setmaxnreg;
- ptxas says that it serialises wgmma (C7510 to C7518), or uses local memory;
- a file lacks the instructions that it is there for;
- a hot loop takes more instructions than its budget.

A hot loop is an innermost loop with products (HGMMA, HMMA). The counts are those of the shortest way through it that makes
all its products. They are issue slots, special functions, the two arithmetic pipes and shared memory. An inner loop
without products is gone through once. Instructions that gather a warp (WARPSYNC) are counted wherever they are in it.
"""

import argparse
import concurrent.futures
import fnmatch
import itertools
import os
import pathlib
import re
import sys
from collections import Counter, namedtuple
from operator import attrgetter
from typing import NamedTuple

from sass import PRODUCTS, Function, Instruction, copies, disassemble

PIPES = {
    "xu": "MUFU I2F F2I",
    "fma": "FFMA FMUL FADD IMAD HFMA2 HADD2 HMUL2",
    "alu": "CS2R F2FP FMNMX FSEL FSET FSETP IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL SHF VIADD VIADDMNMX VIMNMX"
    " VOTE",
    "shared": "LDS LDSM STS STSM LDGSTS SHFL ATOMS",
}
Counts = namedtuple("Counts", ["products", "slots", *PIPES, "warpsync"])
BUDGET_HEAD = (
    "# Instructions of each hot loop, by compiler, that scripts/check-sass.py lets pass: " + " ".join(Counts._fields) + ".\n"
    "# Made by scripts/check-kernels.sh --write-budget."
)
# Those that a file is there for: Hopper's products and bulk copies, some to wait themselves for the kernel before
# (ACQBULK). The windows' kernels, which are bound by memory, are there for its shared memory.
WANTED = {
    "*_window_*": "HMMA LDGSTS",
    "projection_*_sm90": "HGMMA UTMALDG UTMALDG.2D.MULTICAST ACQBULK",
    "*_sm90": "HGMMA UTMALDG",
}
SERIALISED = re.compile(r"\(C751[0-8]\).*")

# --- left operands of wgmma ------------------------------------------------------------------------------------------

# How ptxas writes what the PTX calls so; CS2R are zeros, which it need not convert.
KINDS = {"LDSM": "ldmatrix", "F2FP": "cvt", "CS2R": "cvt"}
ENTRY = re.compile(r"\.entry (\w+)\((.*?)\n\}", re.DOTALL)
WGMMA = re.compile(r"wgmma\.mma_async\S*\.m64n(\d+)k\d+\S* \{[^}]*\}, (\{[^}]*\})?")
PTX_LABEL = re.compile(r"(\$\w+):")
PTX_CODE = re.compile(r"(?:\{ *)?(?:@(!?%p\d+)\s+)?([a-z]\w*)([\w.:]*)\s*(.*?);")
PTX_WRITES = re.compile(r"(\{[^}]*\}|%\w+)(?:\|%\w+)?, *(.*)")
PTX_REGISTER = re.compile(r"%[a-z]+\d+")


def kind_in_ptx(instruction):
    """The kind of a machine's instruction."""
    return KINDS.get(instruction.base, instruction.base)


class Left(NamedTuple):
    """The origin of a register of the left operand of a product of N columns. That is the kinds of the instructions that
    make it, their number, and whether any is in the innermost loop around the product."""

    columns: int
    kinds: frozenset
    number: int
    in_loop: bool

    def __str__(self):
        where = "the loop" if self.in_loop else "before the loop"
        return f"n{self.columns} of {self.number} {'/'.join(sorted(self.kinds))} from {where}"


def function_of_ptx(body):
    """A kernel's PTX as a flow of instructions, and the number of each register. Only copies say which registers they read.

    The flow is needed, since a register may have a value in one loop and another one in the next."""
    code, labels, numbers = [], {}, {}

    def mask(registers):
        return sum({1 << numbers.setdefault(register, len(numbers)) for register in registers})

    for line in map(str.strip, body.splitlines()):
        if found := PTX_LABEL.match(line):
            labels[found[1]] = len(code)
        elif "wgmma.mma_async" in line:
            code.append(Instruction(len(code), None, "wgmma", line))
        elif found := PTX_CODE.match(line):
            predicate, base, modifiers, operands = found.groups()
            written = PTX_WRITES.fullmatch(operands)
            writes = mask(PTX_REGISTER.findall(written[1])) if written else 0
            reads = mask(PTX_REGISTER.findall(written[2])) if written and base == "mov" else 0
            code.append(Instruction(len(code), predicate, base + modifiers, operands, writes, reads))
    for at, instruction in enumerate(code):
        if instruction.base in ("bra", "ret", "exit"):
            flow = instruction._replace(opcode=instruction.base.upper(), operands="")
            code[at] = flow._replace(target=labels[instruction.operands]) if instruction.base == "bra" else flow
    return Function("ptx", code), numbers


def members(copy):
    """The registers that an instruction of the PTX copies."""
    return [number for number in range(copy.reads.bit_length()) if copy.reads >> number & 1]


def left(function, index, columns, register, sources, kind):
    """Where a register of the left operand of a product comes from."""
    origins = function.origins(index, register, sources)
    loop, places = function.innermost(index), {place for place, _ in origins}
    kinds = frozenset("nothing" if at is None else kind(function.code[at]) for _, at in origins)
    inside = any(at is not None and loop and function.block_of[at] in loop.blocks for at in places)
    return Left(columns, kinds, len(places), inside)


def lefts_of_ptx(body):
    """The left operands in registers of a kernel's PTX."""
    function, numbers = function_of_ptx(body)
    lefts = set()
    for index, instruction in enumerate(function.code):
        found = instruction.base == "wgmma" and WGMMA.search(instruction.operands)
        if found and found[2] and index in function.block_of:
            for register in PTX_REGISTER.findall(found[2]):
                origin = left(function, index, int(found[1]), numbers[register], members, attrgetter("base"))
                lefts.add(origin)
    return lefts


def left_register(instruction):
    """The first register of a left operand, if it is in registers."""
    found = re.match(r"(?:R\d+|RZ), R(\d+)", instruction.operands)
    return int(found[1]) if instruction.base == "HGMMA" and found else None


def left_mask(instruction):
    """The registers of a left operand, none if it is in shared memory."""
    first = left_register(instruction)
    return 0 if first is None else 0b1111 << first


def lefts_of_code(function):
    """The left operands in registers of machine code: instruction, loop around it, register, and where it comes from."""
    for index, instruction in enumerate(function.code):
        first = left_register(instruction)
        if first is None or index not in function.block_of:
            continue
        columns, loop = int(re.search(r"64x(\d+)x", instruction.opcode)[1]), function.innermost(index)
        for register in range(first, first + 4):
            yield instruction, loop, register, left(function, index, columns, register, copies, kind_in_ptx)


def check_lefts(found, lefts):
    """Left operands whose registers hold something else than in the PTX."""
    if lefts and not found:
        yield "no HGMMA has a left operand in registers, the PTX has"
    wrong = {instruction: (register, left) for instruction, _, register, left in reversed(found) if left not in lefts}
    for instruction, (register, left) in sorted(wrong.items()):
        in_ptx = ", ".join(sorted(map(str, lefts))) or "none in registers"
        yield f"{instruction}: R{register} is {left}; in the PTX: {in_ptx}"


# --- products in flight ----------------------------------------------------------------------------------------------

# More groups than any kernel has in flight: those committed earlier count as this old.
OLDEST = 7


def advance(function, index, flying):
    """Products that may be in flight after an instruction, with their possible ages as bits: groups committed since, the
    open one being 0."""
    instruction = function.code[index]
    if instruction.base == "HGMMA":
        flying = {**flying, index: flying.get(index, 0) | 1}
        if "gsb0" in instruction.operands:
            last = 1 << OLDEST
            flying = {at: (ages << 1 | ages & last) & (2 * last - 1) for at, ages in flying.items()}
    elif instruction.opcode.startswith("WARPGROUP.DEPBAR"):
        most = int(re.search(r"gsb0, (\w+)", instruction.operands)[1], 0)
        kept = (2 << most) - 1
        flying = {at: ages & kept for at, ages in flying.items() if ages & kept}
    return flying


def check_flights(function):
    """Instructions that touch what a product in flight writes, or write what it reads."""
    entered, work = [None] * len(function.blocks), [0]
    entered[0] = {}
    while work:
        block = work.pop()
        flying = entered[block]
        for index in function.blocks[block]:
            flying = advance(function, index, flying)
        for then in function.after[block]:
            before = entered[then]
            merged = dict(before or {})
            for at, ages in flying.items():
                merged[at] = merged.get(at, 0) | ages
            if merged != before:
                entered[then] = merged
                work.append(then)
    for block, flying in enumerate(entered):
        for index in function.blocks[block]:
            instruction = function.code[index]
            for at in flying or ():
                product = function.code[at]
                # Products with the same accumulators are made in order.
                in_order = instruction.base == "HGMMA" and instruction.writes == product.writes
                touched = left_mask(instruction) if in_order else instruction.reads | instruction.writes
                if touched & product.writes:
                    yield f"{instruction} touches an accumulator of {product}, which is in flight"
                if instruction.writes & left_mask(product):
                    yield f"{instruction} writes a left operand of {product}, which is in flight"
            flying = advance(function, index, flying or {})


# --- the rest --------------------------------------------------------------------------------------------------------


def check_registers(function):
    """Registers beyond those that setmaxnreg leaves."""
    for index, instruction in enumerate(function.code):
        if instruction.base != "USETMAXREG":
            continue
        has = int(re.findall(r"\b(?:0x)?[0-9a-f]+\b", instruction.operands)[-1], 0)
        seen, stack = set(), [(function.block_of[index], index + 1)]
        while stack:
            block, start = stack.pop()
            for at in range(start, function.blocks[block][-1] + 1):
                code = function.code[at]
                if code.base == "USETMAXREG":
                    break
                named = (code.reads | code.writes).bit_length()
                if named > has:
                    yield f"{code} names R{named - 1} where there are {has} registers"
            else:
                fresh = [then for then in function.after[block] if then not in seen]
                seen.update(fresh)
                stack.extend((then, function.blocks[then][0]) for then in fresh)


def count(function, loop):
    """Products and what is counted, along the shortest way through a loop that makes all of its products."""
    way = function.shortest_way(loop)
    bases = Counter(instruction.base for instruction in way)
    products = sum(bases[base] for base in PRODUCTS)
    gathered = sum(instruction.base == "WARPSYNC" for instruction in function.instructions(loop))
    return Counts(products, len(way), *(sum(bases[base] for base in of.split()) for of in PIPES.values()), gathered)


def check_code(name, functions):
    """Local memory, and files without the instructions that they are there for."""
    found = set()
    for function in functions:
        found |= {instruction.opcode for instruction in function.code}
        local = [instruction for instruction in function.code if instruction.base in ("LDL", "STL")]
        if local:
            yield f"{function.name} uses local memory {len(local)} times, first by {local[0]}"
    wanted = next((of for pattern, of in WANTED.items() if fnmatch.fnmatch(name, pattern)), "")
    for opcode in wanted.split():
        if not any(f"{other}.".startswith(f"{opcode}.") for other in found):
            yield f"{name} has no {opcode}"


def examine(nvdisasm, cubin):
    """The counts of each hot loop of a file's kernels, the file's faults, and the kernels whose loops keep a left operand in
    registers."""
    name = cubin.stem.rpartition("-")[0]
    ptx = cubin.with_suffix(".ptx").read_text()
    hopper = "wgmma" in ptx
    functions = disassemble(nvdisasm, cubin, live_ranges=hopper).values()
    bad = [f"{name}: {said}" for said in SERIALISED.findall(cubin.with_suffix(".log").read_text())]
    bad += check_code(name, functions)
    bodies = dict(ENTRY.findall(ptx)) if hopper else {}
    loops, keepers = {}, []
    for function in functions:
        if hopper:
            lefts = list(lefts_of_code(function))
            of_ptx = check_lefts(lefts, lefts_of_ptx(bodies[function.name]))
            found = itertools.chain(of_ptx, check_flights(function), check_registers(function))
            bad += [f"{function.name}: {message}" for message in found]
            if any(loop and not left.in_loop for _, loop, _, left in lefts):
                keepers.append(function.name)
        for number, loop in enumerate(function.hot_loops):
            loops[function.name, number] = count(function, loop)
    return loops, bad, keepers


# --- the table -------------------------------------------------------------------------------------------------------


def read_budget(path):
    """For each loop the counts by release."""
    lines = [line.split("\t") for line in path.read_text().splitlines() if line and not line.startswith("#")]
    _, _, *releases = lines[0]
    return {
        (kernel, int(loop)): {
            release: Counts(*map(int, cell.split())) for release, cell in zip(releases, cells) if cell
        }
        for kernel, loop, *cells in lines[1:]
    }


def write_budget(path, loops, releases):
    """The table of these counts."""
    lines = [BUDGET_HEAD, "\t".join(("kernel", "loop", *releases))]
    for (kernel, loop), counts in sorted(loops.items()):
        cells = (" ".join(map(str, counts.get(release, ()))) for release in releases)
        lines.append("\t".join((kernel, str(loop), *cells)))
    path.write_text("\n".join(lines) + "\n")


def check_budget(loops, budget, releases):
    """Loops over their budget, without one, and budgets of no loop. A compiler that has no column has no budget."""
    known = {release for counts in budget.values() for release in counts} & set(releases)
    for (kernel, loop), counts in sorted((loops | budget).items()):
        for release in sorted(known):
            has, may = loops.get((kernel, loop), {}).get(release), budget.get((kernel, loop), {}).get(release)
            name = f"CUDA {release}: {kernel}, hot loop {loop}"
            if has is None or may is None:
                if has != may:
                    yield f"{name} is {'new' if may is None else 'gone'}: scripts/check-kernels.sh --write-budget"
                continue
            if has.products != may.products:
                yield f"{name} makes {has.products} products, budget {may.products}"
            over = [f"{field} {a}, budget {b}" for field, a, b in zip(has._fields, has, may) if a > b]
            if over and has.products == may.products:
                yield f"{name}: {'; '.join(over)}"


def print_table(loops, releases):
    """A line for each loop, with the counts of each compiler."""
    titles = [name for release in releases for name in (f"CUDA {release}:", *Counts._fields)]
    lines = [["kernel", "loop", *titles]]
    for (kernel, loop), counts in sorted(loops.items()):
        cells = [cell for release in releases for cell in ("", *counts.get(release, ["-"] * len(Counts._fields)))]
        lines.append([kernel, loop, *cells])
    widths = [max(len(str(line[column])) for line in lines) for column in range(len(lines[0]))]
    for line in lines:
        print("  ".join([str(line[0]).ljust(widths[0]), *(str(c).rjust(w) for c, w in zip(line[1:], widths[1:]))]))


def main():
    parser = argparse.ArgumentParser(usage=__doc__.partition("usage: ")[2].partition("\n")[0])
    parser.add_argument("--nvdisasm", default="nvdisasm")
    parser.add_argument("--budget", type=pathlib.Path)
    parser.add_argument("--write", type=pathlib.Path)
    parser.add_argument("folders", nargs="+", type=pathlib.Path)
    given = parser.parse_args()
    files = [(folder.name, cubin) for folder in given.folders for cubin in sorted(folder.rglob("*.cubin"))]
    releases = [folder.name for folder in given.folders]
    loops, kept, bad = {}, [], [] if files else ["there is nothing to check"]
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count()) as pool:
        examined = pool.map(examine, itertools.repeat(given.nvdisasm), [cubin for _, cubin in files])
        for (release, _), (counts, found, keepers) in zip(files, examined):
            bad += [f"CUDA {release}: {message}" for message in found]
            kept += [f"CUDA {release}: {kernel}" for kernel in keepers]
            for loop, of_loop in counts.items():
                loops.setdefault(loop, {})[release] = of_loop
    print_table(loops, releases)
    print("left operands that a loop keeps in registers:", *(kept or ["none"]), sep="\n  ")
    if given.write:
        write_budget(given.write, loops, releases)
    if given.budget:
        bad += check_budget(loops, read_budget(given.budget), releases)
    for message in bad:
        print(f"error: {message}", file=sys.stderr)
    if bad:
        sys.exit(1)
    print(f"{len(loops)} hot loops in {len(files)} files of {len(releases)} compilers: nothing wrong")


if __name__ == "__main__":
    main()
