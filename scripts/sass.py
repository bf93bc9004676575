"""Machine code as nvdisasm lists it: instructions, basic blocks, loops and reaching definitions.

The listing has the live ranges (`-plr`), so which registers an instruction reads and writes is the tool's word. Sets of
registers are integers: bit n is Rn. With encodings (`-hex`), an instruction has its scheduling control too.
"""

import re
import subprocess
from functools import cached_property
from typing import NamedTuple

SECTION = re.compile(r"\.text\.(\w+):")
LABEL = re.compile(r"(\.L_x_\w+|\$\S+):")
CODE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*(?:\(\*.*\*\))?;")
# The upper half of an instruction's 128 bits, on the line below it.
UPPER = re.compile(r"\s+/\* (0x[0-9a-f]{16}) \*/\s*$")
# Above the columns of the live ranges stands the last digit of each register's number.
COLUMNS = re.compile(r"// \|\s+# ((?:0123456789)*\d*)")
TARGET = re.compile(r"`\((\S+)\)$")
REGISTER = re.compile(r"R(\d+)")


PRODUCTS = ("HGMMA", "HMMA")
WIDE_COPY = "BYPASS.128"  # LDGSTS, as cp.async


class Control(NamedTuple):
    """The compiler's word to the scheduler: clocks until the warp's next instruction, and scoreboards. One (or None) is set until
    the result is written, one until the operands are read; a mask has those to wait for."""

    stall: int
    written: int | None
    read: int | None
    waits: int


class Instruction(NamedTuple):
    """One instruction; `target` is where it may branch to, in the function's instructions."""

    address: int
    predicate: str | None
    opcode: str
    operands: str
    writes: int = 0
    reads: int = 0
    target: int | None = None
    control: Control | None = None

    @property
    def base(self):
        return self.opcode.partition(".")[0]

    def __str__(self):
        return f"{self.address:#06x} {self.opcode} {self.operands}"


def disassemble(nvdisasm, cubin, live_ranges=False, encodings=False):
    """The functions of a cubin, by name. Live ranges take a quarter of a minute for a large one."""
    command = [nvdisasm, "-c", *(["-plr", "-lrm", "narrow"] if live_ranges else []), *(["-hex"] if encodings else []), cubin]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return parse(listing.splitlines())


def parse(lines):
    """The functions of a listing, by name."""
    functions, labels, raw, start, count = {}, {}, None, 0, 0
    for line in lines:
        if found := CODE.match(line):
            writes = reads = 0
            if count:
                ranges = line[start : start + count]
                for mark in re.finditer(r"[\^vx]", ranges):
                    bit = 1 << mark.start()
                    writes |= bit if mark[0] != "v" else 0
                    reads |= bit if mark[0] != "^" else 0
            address, predicate, opcode, operands = found.groups()
            raw.append(Instruction(int(address, 16), predicate, opcode, operands, writes, reads))
        elif raw and (found := UPPER.match(line)):
            raw[-1] = raw[-1]._replace(control=control(int(found[1], 16)))
        elif found := SECTION.match(line):
            raw, labels = [], {}
            functions[found[1]] = (raw, labels)
        elif raw is not None and (found := LABEL.match(line)):
            labels[found[1]] = len(raw)
        if "//" in line and (found := COLUMNS.search(line)):
            start, count = found.start(1), len(found[1])
    return {name: Function(name, link(raw, labels)) for name, (raw, labels) in functions.items() if raw}


def control(upper):
    """The scheduling control in the upper half of an encoding: bits 105 to 121 of it all."""
    written, read = (upper >> shift & 7 for shift in (46, 49))
    none = 7
    return Control(
        upper >> 41 & 15, None if written == none else written, None if read == none else read, upper >> 52 & 63
    )


def link(instructions, labels):
    """The same with their targets."""
    linked = []
    for instruction in instructions:
        if instruction.base in ("BRA", "CALL", "JMP", "BRX"):
            found = TARGET.search(instruction.operands)
            if not found or found[1] not in labels:
                raise ValueError(f"{instruction}: where it goes to cannot be told")
            instruction = instruction._replace(target=labels[found[1]])
        linked.append(instruction)
    return linked


def successors(code, index):
    """Instructions that may come after this one, in a function's list."""
    instruction = code[index]
    then = [] if instruction.target is None else [instruction.target]
    # A branch may have its condition among its operands.
    always = instruction.predicate is None
    plain = instruction.opcode in ("BRA", "BRA.U") and "P" not in instruction.operands.partition("`")[0]
    if not (always and (plain or instruction.base in ("EXIT", "RET", "JMP"))) and index + 1 < len(code):
        then.append(index + 1)
    return then


class Loop(NamedTuple):
    """A natural loop: its first block, and all of them."""

    head: int
    blocks: frozenset


class Function:
    """A kernel's instructions, and the basic blocks that a flow from the first one reaches, in reverse postorder."""

    def __init__(self, name, code):
        self.name, self.code = name, code
        follow = [successors(code, index) for index in range(len(code))]
        leaders = {0} | {t for index, then in enumerate(follow) for t in then if then != [index + 1]}
        leaders |= {index + 1 for index, then in enumerate(follow) if then != [index + 1]}
        starts = sorted(leader for leader in leaders if leader < len(code))
        ranges = {start: range(start, end) for start, end in zip(starts, [*starts[1:], len(code)])}
        order, seen, stack = [], {0}, [(0, iter(follow[ranges[0][-1]]))]
        while stack:
            start, then = stack[-1]
            for target in then:
                if target not in seen:
                    seen.add(target)
                    stack.append((target, iter(follow[ranges[target][-1]])))
                    break
            else:
                order.append(start)
                stack.pop()
        number = {start: block for block, start in enumerate(reversed(order))}
        self.blocks = [ranges[start] for start in number]
        self.after = [sorted({number[t] for t in follow[block[-1]]}) for block in self.blocks]
        self.before = [[] for _ in self.blocks]
        for block, then in enumerate(self.after):
            for target in then:
                self.before[target].append(block)
        self.block_of = {index: block for block, span in enumerate(self.blocks) for index in span}

    @cached_property
    def dominators(self):
        """The immediate dominator of each block (Cooper, Harvey and Kennedy)."""
        above = [0] + [None] * (len(self.blocks) - 1)
        changed = True
        while changed:
            changed = False
            for block in range(1, len(self.blocks)):
                new = None
                for other in self.before[block]:
                    if above[other] is None:
                        continue
                    if new is None:
                        new = other
                    while new != other:
                        new, other = (above[new], other) if new > other else (new, above[other])
                if new != above[block]:
                    above[block], changed = new, True
        return above

    def dominates(self, upper, block):
        while block > upper:
            block = self.dominators[block]
        return block == upper

    @cached_property
    def loops(self):
        """All natural loops, those with one head together, inner ones first."""
        bodies = {}
        for block, then in enumerate(self.after):
            for head in (target for target in then if self.dominates(target, block)):
                body, stack = bodies.setdefault(head, {head}), [block]
                while stack:
                    if (found := stack.pop()) not in body:
                        body.add(found)
                        stack.extend(self.before[found])
        return sorted((Loop(head, frozenset(body)) for head, body in bodies.items()), key=lambda loop: len(loop.blocks))

    def innermost(self, index):
        """The smallest loop that an instruction is in."""
        return next((loop for loop in self.loops if self.block_of[index] in loop.blocks), None)

    def instructions(self, loop):
        """A loop's, in the order of the code."""
        return [self.code[index] for block in sorted(loop.blocks) for index in self.blocks[block]]

    @cached_property
    def hot_loops(self):
        """The innermost loops with products, in the order of the code."""
        makers = {
            block for block, span in enumerate(self.blocks) if any(self.code[at].base in PRODUCTS for at in span)
        }
        found = []
        for loop in self.loops:
            if loop.blocks & makers and not any(inner.blocks <= loop.blocks for inner in found):
                found.append(loop)
        return sorted(found, key=lambda loop: self.blocks[loop.head][0])

    def shortest_way(self, loop):
        """The instructions of the shortest way through a loop that makes all of its products and most copies of 16 bytes. An
        inner loop is gone through once."""
        ways = {loop.head: (0, 0, ())}
        best = None
        for block in sorted(loop.blocks):
            if block not in ways:
                continue
            products, slots, way = ways[block]
            code = [self.code[index] for index in self.blocks[block]]
            products -= sum(instruction.base in PRODUCTS or WIDE_COPY in instruction.opcode for instruction in code)
            reached = (products, slots + len(code), (*way, block))
            for then in self.after[block]:
                if then == loop.head:
                    best = min(best or reached, reached)
                elif then in loop.blocks and then > block:
                    ways[then] = min(ways.get(then, reached), reached)
        return [self.code[index] for block in best[2] for index in self.blocks[block]]

    @cached_property
    def written(self):
        """The registers that each block writes."""
        masks = []
        for block in self.blocks:
            mask = 0
            for index in block:
                mask |= self.code[index].writes
            masks.append(mask)
        return masks

    def definitions(self, index, register):
        """The instructions whose value of a register reaches this one; None among them if there may be no value."""
        bit, found, seen = 1 << register, set(), set()
        stack = [(self.block_of[index], index)]
        while stack:
            block, end = stack.pop()
            # A predicated write may leave the value of another one.
            stopped = False
            if self.written[block] & bit:
                for at in range(end - 1, self.blocks[block][0] - 1, -1):
                    if self.code[at].writes & bit:
                        found.add(at)
                        if stopped := self.code[at].predicate is None:
                            break
            if stopped:
                continue
            if block == 0:
                found.add(None)
            for before in self.before[block]:
                if before not in seen:
                    seen.add(before)
                    stack.append((before, self.blocks[before][-1] + 1))
        return found

    def origins(self, index, register, sources):
        """The same through the copies, as pairs of a place and an origin. sources(instruction) are the registers that it
        copies, none if it does more. One that joins the halves of several is the place of their origins."""
        found, seen, stack = set(), set(), [(index, register, None)]
        while stack:
            index, register, joined = stack.pop()
            for at in self.definitions(index, register):
                place = at if joined is None else joined
                copied = [] if at is None else sources(self.code[at])
                if not copied:
                    found.add((place, at))
                for source in copied:
                    item = (at, source, place if len(copied) > 1 else joined)
                    if item not in seen:
                        seen.add(item)
                        stack.append(item)
        return found


def copies(instruction):
    """The registers that an instruction of the machine copies, or joins the lower halves of, if that is all it does."""
    operands = instruction.operands.replace(".reuse", "").split(", ")
    if instruction.base == "MOV":
        copied = operands[1:2]
    elif instruction.opcode.startswith("IMAD.MOV") and operands[1:3] == ["RZ", "RZ"]:
        copied = operands[3:4]
    elif instruction.base == "PRMT" and operands[2] == "0x5410":
        copied = [operands[1], operands[3]]
    else:
        copied = []
    found = [REGISTER.fullmatch(operand) for operand in copied]
    return [int(register[1]) for register in found] if all(found) else []
