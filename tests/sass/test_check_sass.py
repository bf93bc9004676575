#!/usr/bin/env python3
"""scripts/check-sass.py has to find what it looks for: faults planted in short listings, and the one that compilers make.

usage: test_check_sass.py --nvdisasm PROGRAM [FOLDER..]

FOLDER: overwritten_keys.cu by a compiler that overwrites them (scripts/check-kernels.sh).
"""

import importlib.util
import pathlib
import sys
import tempfile
import unittest

SCRIPTS = pathlib.Path(__file__).resolve().parents[2] / "scripts"
sys.path.insert(0, str(SCRIPTS))
import sass  # noqa: E402

SPEC = importlib.util.spec_from_file_location("check_sass", SCRIPTS / "check-sass.py")
check = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(check)

GIVEN = {"nvdisasm": None, "wrong": []}


def registers(text):
    """`4-7 9` as a set."""
    mask = 0
    for item in text.split():
        first, _, last = item.partition("-")
        for register in range(int(first), int(last or first) + 1):
            mask |= 1 << register
    return mask


def function(text):
    """A kernel of lines `[@P0 ]OPCODE OPERANDS | registers written | registers read`, and of labels."""
    code, labels = [], {}
    for line in filter(None, map(str.strip, text.splitlines())):
        if line.endswith(":"):
            labels[line[:-1]] = len(code)
            continue
        instruction, *sets = map(str.strip, line.split("|"))
        predicate = None
        if instruction.startswith("@"):
            predicate, _, instruction = instruction[1:].partition(" ")
        opcode, _, operands = instruction.partition(" ")
        writes, reads = map(registers, [*sets, "", ""][:2])
        code.append(sass.Instruction(16 * len(code), predicate, opcode, operands, writes, reads))
    return sass.Function("kernel", sass.link(code, labels))


# Keys stay in R4 to R7; weights are made in R8 to R11 in each step.
KEYS_STAY = """
    LDSM.16.M88.4 R4, [R0] | 4-7 | 0
top:
    HGMMA.64x64x16.F32 R24, R4, gdesc[UR4], RZ, !UPT, gsb0 | 24-55 | 4-7
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    F2FP.F16.F32.PACK_AB R8, R25, R24 | 8 | 24 25
    F2FP.F16.F32.PACK_AB R9, R27, R26 | 9 | 26 27
    F2FP.F16.F32.PACK_AB R10, R29, R28 | 10 | 28 29
    F2FP.F16.F32.PACK_AB R11, R31, R30 | 11 | 30 31
    HGMMA.64x64x16.F32 R56, R8, gdesc[UR4], R56, gsb0 | 56-87 | 8-11 56-87
    WARPGROUP.DEPBAR.LE gsb0, 0x0
    @P0 BRA `(top)
    EXIT
"""
KEYS_STAY_PTX = """
    ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r1, %r2, %r3, %r4}, [%r9];
$L__BB0_1:
    wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%f1, %f2}, {%r1, %r2, %r3, %r4}, %rd1, p, 1, 1, 0;
    {  cvt.rn.f16.f32 %rs1, %f1;}
    {  cvt.rn.f16.f32 %rs2, %f2;}
    mov.b32 %r5, {%rs1, %rs2};
    wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {%f3, %f4}, {%r5, %r5, %r5, %r5}, %rd1, p, 1, 1, 0;
    @%p1 bra $L__BB0_1;
"""
LEFTS = check.lefts_of_ptx(KEYS_STAY_PTX)


class LeftOperands(unittest.TestCase):
    def found(self, original, planted):
        self.assertIn(original, KEYS_STAY)
        lefts = check.lefts_of_code(function(KEYS_STAY.replace(original, planted)))
        return list(check.check_lefts(list(lefts), LEFTS))

    def test_the_ptx_tells_what_stays(self):
        keys = check.Left(64, frozenset(["ldmatrix"]), 1, False)
        self.assertEqual(LEFTS, {keys, check.Left(64, frozenset(["cvt"]), 1, True)})

    def test_keys_that_stay_are_right(self):
        self.assertEqual(self.found("EXIT", "EXIT"), [])

    def test_registers_given_to_other_values_are_found(self):
        original = "F2FP.F16.F32.PACK_AB R11, R31, R30 | 11 |"
        found = self.found(original, f"{original.replace('11', '7')} 30 31\n{original}")
        self.assertEqual(len(found), 1)
        self.assertIn("R7 is n64 of 2 cvt/ldmatrix from the loop", found[0])

    def test_keys_loaded_over_others_are_found(self):
        again = "LDSM.16.M88.4 R4, [R1] | 4-7 | 1\n@P0 BRA `(top)"
        self.assertIn("of 2 ldmatrix from the loop", self.found("@P0 BRA `(top)", again)[0])

    def test_a_value_that_may_be_missing_is_found(self):
        found = self.found("LDSM.16.M88.4 R4, [R0]", "@P1 LDSM.16.M88.4 R4, [R0]")
        self.assertIn("of 2 ldmatrix/nothing", found[0])

    def test_weights_that_another_step_may_have_left_are_found(self):
        # The last of them is packed only if there is a mask.
        original = "F2FP.F16.F32.PACK_AB R11, R31, R30"
        found = self.found(original, f"MOV R11, RZ | 11 |\n@P1 {original}")
        self.assertIn("R11 is n64 of 2", found[0])

    def test_copies_are_followed(self):
        copies = "\n".join(f"MOV R{n}, R{n + 96} | {n} | {n + 96}" for n in range(4, 8))
        original = "LDSM.16.M88.4 R4, [R0] | 4-7 | 0"
        self.assertEqual(self.found(original, f"LDSM.16.M88.4 R100, [R0] | 100-103 | 0\n{copies}"), [])

    def test_halves_converted_apart_are_one_conversion(self):
        whole = "F2FP.F16.F32.PACK_AB R11, R31, R30 | 11 | 30 31"
        halves = "\n".join(f"F2FP.F16.F32.PACK_AB R{n}, RZ, R{n + 19} | {n} | {n + 19}" for n in (11, 12))
        joined = f"{halves}\nPRMT R11, R11, {{}}, R{{}} | 11 | 11 {{}}"
        self.assertEqual(self.found(whole, joined.format("0x5410", 12, 12)), [])
        self.assertIn("of 1 cvt/ldmatrix from the loop", self.found(whole, joined.format("0x5410", 7, 7))[0])
        self.assertIn("of 1 PRMT from the loop", self.found(whole, joined.format("0x3210", 12, 12))[0])

    def test_a_register_of_two_loops_has_each_ones_value(self):
        product = "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1, %f2}, {%r1, %r1, %r1, %r1}, %rd1, p, 1, 1, 0;"
        convert = "cvt.rn.bf16x2.f32 %r1, %f2, %f1;"
        # Both loops begin with the weights made before them, and the last product has those of either.
        first = f"$L_1:\n{product}\n{convert}\n@%p1 bra $L_1;\nbra.uni $L_3;"
        second = f"$L_2:\n{product}\n{convert}\n@%p1 bra $L_2;"
        lefts = check.lefts_of_ptx(f"{convert}\n@%p2 bra $L_2;\n{first}\n{second}\n$L_3:\n{product}\nret;")
        self.assertEqual(lefts, {check.Left(64, frozenset(["cvt"]), 2, in_loop) for in_loop in (True, False)})

    def test_operands_that_went_to_memory_are_found(self):
        only_memory = function("HGMMA.64x64x16.F32 R24, gdesc[UR4], RZ, !UPT, gsb0 | 24-55 |\nEXIT")
        self.assertEqual(len(list(check.check_lefts(list(check.lefts_of_code(only_memory)), LEFTS))), 1)


class ProductsInFlight(unittest.TestCase):
    FIRST = "HGMMA.64x64x16.F32 R24, R4, gdesc[UR4], RZ, !UPT, gsb0 | 24-55 | 4-7\n"
    SECOND = "HGMMA.64x64x16.F32 R56, R8, gdesc[UR4], RZ, !UPT, gsb0 | 56-87 | 8-11\n"
    WAIT, READ = "WARPGROUP.DEPBAR.LE gsb0, {}\n", "FADD R0, R24, R25 | 0 | 24 25\n"

    def found(self, *lines):
        return list(check.check_flights(function("".join(lines) + "EXIT")))

    def test_what_has_been_waited_for_may_be_touched(self):
        self.assertEqual(self.found(self.FIRST, self.SECOND, self.WAIT.format("0x1"), self.READ), [])
        self.assertEqual(self.found(self.FIRST, self.FIRST, self.WAIT.format("0x0"), self.READ), [])

    def test_accumulators_read_or_written_too_early_are_found(self):
        self.assertIn("touches an accumulator", self.found(self.FIRST, self.READ)[0])
        self.assertEqual(len(self.found(self.SECOND, self.FIRST, self.WAIT.format("0x1"), self.READ)), 1)
        self.assertEqual(len(self.found(self.FIRST, "MOV R30, RZ | 30 |\n")), 1)

    def test_left_operands_written_too_early_are_found(self):
        pack = "F2FP.F16.F32.PACK_AB R5, R1, R0 | 5 | 0 1\n"
        self.assertIn("writes a left operand", self.found(self.FIRST, pack)[0])
        self.assertEqual(self.found(self.FIRST, self.WAIT.format("0x0"), pack), [])

    def test_a_left_operand_still_in_the_making_is_found(self):
        chained = "HGMMA.64x64x16.F32 R56, R24, gdesc[UR4], RZ, !UPT, gsb0 | 56-87 | 24-27\n"
        self.assertEqual(len(self.found(self.FIRST, chained)), 1)
        within = "HGMMA.64x64x16.F32 R24, R28, gdesc[UR4], R24, gsb0 | 24-55 | 24-55\n"
        self.assertEqual(len(self.found(self.FIRST, within)), 1)

    def test_flights_go_round_loops_and_through_branches(self):
        loop = ["top:\n", self.READ, self.FIRST, "@P0 BRA `(top)\n"]
        self.assertEqual(len(self.found(*loop)), 1)
        self.assertEqual(self.found(*loop[:3], self.WAIT.format("0x0"), loop[3]), [])
        for ways in [("", self.SECOND), (self.SECOND, "")]:
            other_group = ["@P0 BRA `(other)\n", ways[0], "BRA `(join)\n", "other:\n", ways[1], "join:\n"]
            found = self.found(self.FIRST, *other_group, self.WAIT.format("0x1"), self.READ)
            self.assertEqual(len(found), 1, "a group less on one of the ways")
        wait_on_one_way = ["@P0 BRA `(skip)\n", self.WAIT.format("0x0"), "skip:\n", self.READ]
        self.assertEqual(len(self.found(self.FIRST, *wait_on_one_way)), 1)


class Registers(unittest.TestCase):
    def test_registers_given_back_are_not_used(self):
        text = """
            @P0 BRA `(consumer)
            USETMAXREG.DEALLOC.CTAPOOL 0x18
            MOV R{}, RZ | {} |
            EXIT
        consumer:
            USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xf0
            MOV R239, RZ | 239 |
            EXIT
        """
        self.assertEqual(list(check.check_registers(function(text.format(23, 23)))), [])
        found = list(check.check_registers(function(text.format(24, 24))))
        self.assertEqual(len(found), 1)
        self.assertIn("names R24 where there are 24", found[0])


class HotLoops(unittest.TestCase):
    TEXT = """
        MOV R0, RZ
    rows:
        MOV R1, RZ
    top:
        LDS R2, [R1]
        @P1 BRA `(no_mask)
        LOP3.LUT R3, R2
        LOP3.LUT R3, R3
    no_mask:
        HMMA.16816.F32 R8, R2, R4, R8
    spin:
        SYNCS.PHASECHK.TRANS64.TRYWAIT P2, [UR4]
        @!P2 BRA `(spin)
        MUFU.EX2 R8, R8
        FFMA R8, R8, R8, R8
        @P0 BRA `(top)
        @P3 BRA `(rows)
        EXIT
    """

    def loop(self, text=TEXT):
        loops = function(text).hot_loops
        self.assertEqual(len(loops), 1)
        return check.count(function(text), loops[0])

    def test_the_shortest_way_that_makes_the_products_is_counted(self):
        expected = check.Counts(products=1, slots=8, xu=1, fma=1, alu=0, shared=1, warpsync=0)
        self.assertEqual(self.loop(), expected)

    def test_a_way_past_the_products_is_not_taken(self):
        past = self.TEXT.replace("LDS R2, [R1]", "LDS R2, [R1]\n@P4 BRA `(spin)")
        self.assertEqual(self.loop(past).products, 1)

    def test_what_a_loop_gains_is_over_its_budget(self):
        counts = {("kernel", 0): {"13.0": self.loop()}}
        budget = lambda loops: list(check.check_budget(loops, counts, ["13.0"]))  # noqa: E731
        self.assertEqual(budget(counts), [])
        for planted, said in [("FADD R9, R8, R8", "fma 2, budget 1"), ("WARPSYNC.ALL", "warpsync 1, budget 0")]:
            more = self.loop(self.TEXT.replace("MUFU", f"{planted}\nMUFU"))
            self.assertIn(said, budget({("kernel", 0): {"13.0": more}})[0])
        fewer = self.loop(self.TEXT.replace("FFMA R8, R8, R8, R8", ""))
        self.assertEqual(budget({("kernel", 0): {"13.0": fewer}}), [])
        self.assertIn("is gone", budget({})[0])
        self.assertIn("is new", budget({**counts, ("other", 0): counts["kernel", 0]})[0])

    def test_the_table_is_read_as_it_was_written(self):
        counts = {("kernel", 0): {"13.0": self.loop()}, ("kernel", 1): {"13.0": self.loop(), "13.5": self.loop()}}
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "budget.tsv"
            check.write_budget(path, counts, ["13.0", "13.5"])
            self.assertEqual(check.read_budget(path), counts)

    def test_a_compiler_without_a_column_has_no_budget(self):
        counts = {("kernel", 0): {"12.9": self.loop()}}
        self.assertEqual(list(check.check_budget(counts, {("kernel", 0): {"13.0": self.loop()}}, ["12.9"])), [])


class Files(unittest.TestCase):
    def test_local_memory_is_found(self):
        found = list(check.check_code("low_rank", [function("LDL R0, [R1]\nEXIT")]))
        self.assertIn("local memory", found[0])

    def test_missing_instructions_are_found(self):
        code = "HMMA.16816.F32 R8, R2, R4, R8\nLDGSTS.E.BYPASS [R0], desc[UR4]\nEXIT"
        self.assertEqual(list(check.check_code("a_window_fwd_sm90", [function(code)])), [])
        self.assertEqual(list(check.check_code("a_sm90", [function(code)])), ["a_sm90 has no HGMMA", "a_sm90 has no UTMALDG"])

    def test_what_ptxas_says_of_serialised_products_is_found(self):
        said = "ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ..."
        self.assertTrue(check.SERIALISED.findall(said))

    def test_a_listing_is_read_with_its_live_ranges(self):
        listing = [
            ".text.kernel:",
            "                            // |   # 01234567890 |   # 0 |",
            "        /*0000*/            LDSM.16.M88.4 R4, [R0] ;  // |   5 v   ^^^^    |     |",
            ".L_x_1:                     // |                 |     |",
            "        /*0010*/      @!P0  FADD R0, R4, R5 ;         // |   5 ^   vv::    |   1 v |",
            "        /*0020*/            BRA `(.L_x_1) ;           // |                 |     |",
        ]
        listing[1:] = [line.partition("//")[0].ljust(60) + "".join(line.partition("//")[1:]) for line in listing[1:]]
        code = sass.parse(listing)["kernel"].code
        self.assertEqual((code[0].writes, code[0].reads), (registers("4-7"), registers("0")))
        self.assertEqual((code[1].predicate, code[1].opcode, code[1].reads), ("!P0", "FADD", registers("4 5")))
        self.assertEqual(code[2].target, 1)


class Compilers(unittest.TestCase):
    def test_the_registers_that_ptxas_overwrites_are_found(self):
        for folder in GIVEN["wrong"]:
            for cubin in folder.rglob("*.cubin"):
                with self.subTest(cubin=str(cubin)):
                    _, found, _ = check.examine(GIVEN["nvdisasm"], cubin)
                    # Four steps of the product with the keys, and four with the values; no other fault.
                    self.assertEqual(len(found), 8, found)
                    for message in found:
                        self.assertRegex(message, "is n64 of 2 cvt/ldmatrix from the loop")


if __name__ == "__main__":
    at = sys.argv.index("--nvdisasm") if "--nvdisasm" in sys.argv else sys.exit(__doc__)
    GIVEN["nvdisasm"] = sys.argv[at + 1]
    GIVEN["wrong"] = [pathlib.Path(folder) for folder in sys.argv[at + 2 :]]
    unittest.main(argv=sys.argv[:1])
