#!/usr/bin/env python3
"""Tests of scripts/scheduler_model.py on loops whose clocks are known: python3 tests/sass/test_scheduler_model.py"""

import pathlib
import sys
import unittest

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[2] / "scripts"))
import scheduler_model as model  # noqa: E402
from sass import Control, Instruction, control  # noqa: E402


def way(*lines):
    """Instructions of lines `OPCODE OPERANDS | stall | scoreboard written | mask of waits`."""
    code = []
    for line in lines:
        text, *numbers = (part.strip() for part in line.split("|"))
        opcode, _, operands = text.partition(" ")
        stall, written, waits = (int(number) if number else None for number in (*numbers, *[""] * (3 - len(numbers))))
        code.append(Instruction(0, None, opcode, operands, control=Control(stall or 1, written, None, waits or 0)))
    return code


class SchedulerModel(unittest.TestCase):
    def clocks(self, code, warps, arch="sm_90"):
        found = model.predict(code, arch, warps)
        return found.fair, found.greedy

    def test_a_dependent_chain_takes_its_stalls(self):
        self.assertEqual(self.clocks(way(*["FADD R0, R0, R1 | 4"] * 5), 1), (20, 20))

    def test_another_warp_fills_the_stalls(self):
        self.assertEqual(self.clocks(way(*["FADD R0, R0, R1 | 4"] * 5), 4), (20, 20))
        self.assertEqual(self.clocks(way(*["FADD R0, R0, R1 | 4"] * 5), 8), (40, 40))

    def test_the_slowest_pipe_bounds(self):
        found = model.predict(way(*["MUFU.EX2 R0, R1", "FADD R2, R3, R4", "FMNMX R5, R6, R7, PT"] * 4), "sm_90", 2)
        self.assertEqual((found.fair, found.greedy, found.bound, found.pipe), (64, 64, 64, "xu"))
        on_ampere = model.predict(way(*["FFMA R0, R1, R2, R3"] * 8), "sm_80", 2)
        self.assertEqual((on_ampere.fair, on_ampere.bound), (32, 32))
        products = way(*["HMMA.16816.F32.BF16 R0, R4, R8, R0"] * 4)
        self.assertEqual([model.predict(products, arch, 2).bound for arch in ("sm_80", "sm_86")], [64, 256])

    def test_a_scoreboard_holds_a_result_back(self):
        code = way("LDS R0, [R1] | 1 | 0 | ", "FADD R2, R0, R0 | 1 | | 1")
        self.assertGreaterEqual(min(self.clocks(code, 1)), model.LATENCY["shared"])

    def test_wide_reads_of_shared_memory_take_longer(self):
        narrow, wide, matrices = way("LDS R0, [R1]", "LDS.64 R0, [R1]", "LDSM.16.M88.4 R0, [R1]")
        self.assertEqual([model.shared_clocks(read) for read in (narrow, wide, matrices)], [4, 8, 16])

    PRODUCT = "HGMMA.64x128x16.F32 R24, gdesc[UR4], R24, gsb0 | 1"

    def test_products_wait_for_the_tensor_cores(self):
        work = ["FADD R0, R0, R1 | 15"] * 4
        alone = self.clocks(way(self.PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0 | 1", *work), 1)
        self.assertGreater(min(alone), 64 + 60 + model.END - 1)
        # Beside another warp's work, the tensor cores never rest.
        both = self.clocks(way(self.PRODUCT, "WARPGROUP.DEPBAR.LE gsb0, 0x0 | 1", *work[:1]), 3)
        self.assertLess(max(both), 3 * 64 + 8)

    def test_left_operands_in_registers_spare_shared_memory(self):
        in_registers = self.PRODUCT.replace("gdesc", "R4, gdesc")
        self.assertEqual([model.wgmma(code)[1] for code in way(self.PRODUCT, in_registers)], [6144, 4096])

    def test_warps_take_turns(self):
        code = way("BAR.SYNC 0x1, 0x100", *["FADD R0, R0, R1 | 4"] * 10, "BAR.ARV 0x2, 0x100")
        self.assertGreaterEqual(min(self.clocks(code, 2)), 2 * (40 + model.BARRIER))

    def test_control_is_read_from_the_encoding(self):
        upper = 5 << 41 | 2 << 46 | 7 << 49 | 0b100001 << 52
        self.assertEqual(control(upper), Control(stall=5, written=2, read=None, waits=0b100001))


if __name__ == "__main__":
    unittest.main()
