#!/usr/bin/env python3
"""Predicts the clocks of a kernel's hot loops from its machine code; needs no GPU.

usage: scheduler_model.py [--nvdisasm PROGRAM] [--arch sm_80|sm_86|sm_90] [--warps N] [--kernel EXPRESSION] CUBIN..

One of a multiprocessor's four schedulers issues the shortest way through each loop (Function.shortest_way), again and
again. It does so for N warps: on Hopper one of each consumer warpgroup. The warps issue in order, as the encoded control says: stall
clocks and scoreboards. A pipe takes one instruction in so many clocks, and the tensor cores work through a queue. The other
three schedulers are taken to do the same, so shared memory serves each a quarter of the time.

Two rules of choice between ready warps bracket the hardware's: the one that has waited longest, and the one that issued last.
The clocks are those in which every warp makes one step. No GPU has calibrated them: compare two codes by them, or a code with
its bounds. Copies occupy shared memory when they are issued. Bank conflicts and missing data are left out.
"""

import argparse
import re
from collections import Counter, namedtuple

from sass import disassemble

# Clocks that a pipe takes for a warp's instruction: 32 lanes, by a scheduler's lanes in that pipe. The rates are
# in the table "Throughput of Native Arithmetic Instructions" of NVIDIA's CUDA C++ Programming Guide. By clock and
# multiprocessor, f32 has 64 on compute capability 8.0 and 128 on 8.6, 8.9 and 9.0. Integers, comparisons and conversions to
# 16 bits have 64, special functions 16. The integer multiplier (64) stands beside the f32 pipe. NVIDIA's A100 white paper:
# 1024 multiply-adds of 16 bits; m16n8k16 has 2048.
CLOCKS = {
    "sm_80": {"xu": 8, "alu": 2, "fma": 2, "imad": 2, "hmma": 8},
    # GeForce of compute capability 8.6 and 8.9: 256 multiply-adds of 16 bits with sums in f32. White papers of GA102 (RTX 3080:
    # 59.5 TFLOP/s, 68 multiprocessors, 1.71 GHz) and of Ada (RTX 4090: 165.2, 128, 2.52 GHz).
    "sm_86": {"xu": 8, "alu": 2, "fma": 1, "imad": 2, "hmma": 32},
    # H100 white paper: 2048 multiply-adds. mma.sync reaches about 0.62 of it (Luo et al., arXiv 2402.13499, table 8).
    "sm_90": {"xu": 8, "alu": 2, "fma": 1, "imad": 2, "hmma": 6.5},
}
PIPES = {
    "xu": "MUFU I2F F2I I2FP",
    "alu": "CS2R F2FP FMNMX FSEL FSET FSETP IADD3 IMNMX ISETP LEA LOP3 MOV P2R PLOP3 PRMT R2P SEL SHF VIADD VIADDMNMX"
    " VIMNMX VOTE",
    "fma": "FFMA FMUL FADD HFMA2 HADD2 HMUL2",
    "imad": "IMAD",
    "hmma": "HMMA",
    "shared": "LDS LDSM STS STSM LDGSTS SHFL ATOMS",
}
PIPE = {base: pipe for pipe, bases in PIPES.items() for base in bases.split()}
# Shared memory moves 128 bytes a clock for the whole multiprocessor, 32 for one of four busy schedulers.
SHARED_BYTES, SCHEDULERS = 128, 4
# Clocks until the result, as in "Dissecting the NVIDIA Volta GPU" (Jia et al., arXiv 1804.06826, table 4.1). Global memory
# is read long before it is used, so its latency does not count.
LATENCY = {"shared": 30, "xu": 22, None: 20}
# From the issue of wgmma to its start, and from its end to the wait that sees it.
START, END = 8, 32
BARRIER = 20

Prediction = namedtuple("Prediction", "slots fair greedy bound pipe")


def wgmma(instruction):
    """Clocks of the tensor cores, and bytes of shared memory, of an HGMMA: 64 rows, N columns, a depth of 32 bytes."""
    columns = int(re.search(r"64x(\d+)x", instruction.opcode)[1])
    if "gdesc[URZ]" in instruction.operands:  # commits a group, multiplies nothing
        return 0, 0
    left = 0 if re.match(r"R\w+, R\d+", instruction.operands) else 64
    return columns / 2, 32 * (left + columns)


def shared_clocks(instruction):
    """Clocks of a scheduler's quarter of shared memory."""
    if instruction.base == "LDSM":
        words = int(instruction.opcode.rpartition(".")[2]) if instruction.opcode[-1].isdigit() else 1
    else:
        width = re.search(r"\.(64|128)\b", instruction.opcode)
        words = int(width[1]) // 32 if width else 1
    return words * 32 * 4 * SCHEDULERS / SHARED_BYTES


class Multiprocessor:
    """Pipes, each with the clock from which it is free, and how long each has been busy."""

    def __init__(self, arch):
        self.clocks, self.free, self.busy = CLOCKS[arch], Counter(), Counter()

    def take(self, pipe, start, clocks):
        """Occupies a pipe and returns when it is free again."""
        self.free[pipe] = max(self.free[pipe], start) + clocks
        self.busy[pipe] += clocks
        return self.free[pipe]


class Warp:
    """A warp on its endless way through a loop."""

    def __init__(self, number):
        self.number, self.at, self.ready, self.issued = number, 0, 0, -1
        self.scoreboards, self.groups, self.turns = [0] * 6, [], []

    def earliest(self, instruction, sm, takes_turns):
        """The clock from which the instruction may be issued; None while another warp has the turn."""
        start = max([self.ready, *(at for n, at in enumerate(self.scoreboards) if instruction.control.waits >> n & 1)])
        pipe = PIPE.get(instruction.base)
        if pipe:
            start = max(start, sm.free[pipe])
        if instruction.opcode.startswith("WARPGROUP.DEPBAR"):
            may_fly = int(re.search(r"gsb0, (\w+)", instruction.operands)[1], 0)
            start = max([start, *self.groups[: len(self.groups) - may_fly]])
        if takes_turns and instruction.opcode.startswith("BAR.SYNC"):
            if not self.turns:
                return None
            start = max(start, self.turns[0] + BARRIER)
        return start

    def issue(self, instruction, now, sm):
        """Issues the instruction, and sets the clocks that later ones wait for."""
        control, pipe = instruction.control, PIPE.get(instruction.base)
        self.ready, self.issued = now + max(1, control.stall), now
        if instruction.base == "HGMMA":
            clocks, size = wgmma(instruction)
            # Its operands stream between other reads: they count for the bound alone.
            sm.busy["shared"] += size / SHARED_BYTES
            done = sm.take("tensor", now + START, clocks) + END
            if "gsb0" in instruction.operands:
                self.groups = [*self.groups, done][-8:]
        elif pipe:
            sm.take(pipe, now, shared_clocks(instruction) if pipe == "shared" else sm.clocks[pipe])
        done = max(now, sm.free[pipe] if pipe == "shared" else now) + LATENCY.get(pipe, LATENCY[None])
        for board, at in ((control.written, done), (control.read, now + LATENCY[None] // 2)):
            if board is not None:
                self.scoreboards[board] = max(self.scoreboards[board], at)


def simulate(way, arch, warps, fair, steps=40):
    """Clocks of a step of all warps, and of each pipe's work in it."""
    sm, now = Multiprocessor(arch), 0
    crew = [Warp(number) for number in range(warps)]
    takes_turns = any(instruction.opcode.startswith("BAR.ARV") for instruction in way)
    crew[0].turns = [0]
    ends = []  # of a warp's steps
    while len(ends) < steps * warps:
        ready = []
        for warp in crew:
            start = warp.earliest(way[warp.at], sm, takes_turns)
            if start is not None:
                ready.append((max(start, now), warp.issued if fair else -warp.issued, warp.number))
        start, _, number = min(ready)
        warp, instruction = crew[number], way[crew[number].at]
        warp.issue(instruction, start, sm)
        if takes_turns and instruction.opcode.startswith("BAR.SYNC"):
            warp.turns.pop(0)
        if instruction.opcode.startswith("BAR.ARV"):
            crew[(number + 1) % warps].turns.append(start)
        sm.busy["issue"] += 1
        now = start + 1
        warp.at = (warp.at + 1) % len(way)
        if warp.at == 0:
            ends.append(start)
    half = steps // 2
    clocks = (ends[-1] - ends[half * warps - 1]) / (steps - half)
    return clocks, {pipe: busy / len(ends) * warps for pipe, busy in sm.busy.items()}


def predict(way, arch, warps):
    """Slots of a warp's step; clocks of all warps' steps by both rules; the busiest pipe and its clocks, the bound."""
    fair, busy = simulate(way, arch, warps, fair=True)
    greedy, _ = simulate(way, arch, warps, fair=False)
    pipe = max(busy, key=busy.get)
    return Prediction(len(way), round(fair), round(greedy), round(busy[pipe]), pipe)


def main():
    parser = argparse.ArgumentParser(usage=__doc__.partition("usage: ")[2].partition("\n")[0])
    parser.add_argument("--nvdisasm", default="nvdisasm")
    parser.add_argument("--arch", choices=CLOCKS, default="sm_90")
    parser.add_argument("--warps", type=int, default=2)
    parser.add_argument("--kernel", default="")
    parser.add_argument("cubins", nargs="+")
    given = parser.parse_args()
    print("kernel\tloop", *Prediction._fields, sep="\t")
    for cubin in given.cubins:
        for name, function in disassemble(given.nvdisasm, cubin, encodings=True).items():
            if re.search(given.kernel, name):
                for number, loop in enumerate(function.hot_loops):
                    print(name, number, *predict(function.shortest_way(loop), given.arch, given.warps), sep="\t")


if __name__ == "__main__":
    main()
