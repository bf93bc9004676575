"""The GPU kit on programs that misbehave: `python3 -m unittest discover -s scripts/gpu`. Wants no GPU."""

import contextlib
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import unittest

HERE = pathlib.Path(__file__).resolve().parent
PROGRAMS = ["gpu", "smoke", "headline", "cases"]
TOOLS = ["nvidia-smi", "ncu", "compute-sanitizer"]
# All but `peers`, which is PyTorch's.
STEPS = ["warm", "smoke", "headline", "profile", "tests", "sanitizers"]
MAIN = ["smoke", "tests", "headline"]
# Only a visit that hangs takes as long.
SECONDS = 60


class Visit:
    """A run of the kit: what it left and how long it took."""

    def __init__(self, folder, fake, steps=STEPS, seconds=SECONDS):
        self.folder, self.results = folder, folder / "results"
        (folder / "bin").mkdir()
        shutil.copy(HERE / "fake_gpu.py", folder / "gpu")
        for name in PROGRAMS[1:]:
            (folder / name).symlink_to("gpu")
        for name in TOOLS:
            (folder / "bin" / name).symlink_to("../gpu")
        for name in ("VERSION", "BUILD"):
            (folder / name).write_text("fake\n")
        environment = dict(os.environ, FAKE=fake, FAKE_RESULTS=str(self.results))
        environment["PATH"] = f"{folder / 'bin'}:{environment['PATH']}"
        command = [sys.executable, HERE / "kit.py", "--plan", "short", "--kit", folder, "--results", self.results]
        command += ["--seconds", str(seconds), *steps]
        self.start = time.monotonic()
        self.process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)

    def wait(self):
        self.out, _ = self.process.communicate(timeout=SECONDS + 10)
        self.seconds = time.monotonic() - self.start
        return self

    def read(self):
        return json.loads((self.results / "results.json").read_text())

    def steps(self):
        return self.read()["steps"]


class Kit(unittest.TestCase):
    def visit(self, fake, **options):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        return Visit(pathlib.Path(folder.name), fake, **options)

    def ended(self, fake, status=1, **options):
        """A visit that came to its end in time, all files whole."""
        visit = self.visit(fake, **options).wait()
        self.assertLess(visit.seconds, options.get("seconds", SECONDS) + 3)
        self.assertEqual(visit.process.returncode, status, visit.out)
        self.assertEqual(list(visit.results.glob("*.part")), [])
        self.assertLessEqual(len(list(visit.results.iterdir())), 8)
        return visit

    def results(self, visit):
        return {name: step["result"] for name, step in visit.steps().items()}

    def test_programs_that_behave_pass(self):
        visit = self.ended("", status=0)
        results = self.results(visit)
        self.assertEqual(set(results.values()), {"passed"}, visit.steps())
        self.assertEqual(set(results) - {"memcheck", "racecheck"}, set(STEPS) - {"sanitizers"})
        self.assertIn("FAKE GPU", visit.read()["device"])
        self.assertIn("| qkv_lora | Portable | 0.12 | 0.5 |", visit.out)
        self.assertIn("| projection | bf16 | native | ok | out 1.0e-3 <= 8.0e-3 |", visit.out)
        self.assertIn("| attention_global_64 forward batch 1 grid 64 | 95 to 140 | 130.0 | as expected |", visit.out)
        self.assertEqual(visit.steps()["headline"]["rows"][0]["sm_mhz"], 1980)

    def test_a_hang_ends_its_step_alone(self):
        visit = self.ended("smoke=hang headline=hang", steps=["smoke", "tests", "headline"], seconds=12)
        results = self.results(visit)
        self.assertEqual((results["smoke"], results["headline"]), ("failed", "failed"))
        self.assertEqual(results["tests"], "passed")
        self.assertIn("out of time", visit.steps()["smoke"]["failures"]["qkv_lora"])

    def test_a_family_that_hangs_is_left_out(self):
        visit = self.ended("smoke=watchdog@qkv_lora", steps=["smoke", "headline", "tests"])
        steps = visit.steps()
        self.assertEqual(set(steps["smoke"]["failures"]), {"qkv_lora"})
        self.assertIn("status 71", steps["smoke"]["failures"]["qkv_lora"])
        self.assertIn("the portable kernels alone: right", steps["smoke"]["failures"]["qkv_lora"])
        self.assertEqual({row["family"] for row in steps["headline"]["rows"]}, {"attention_global_64", "layer_norm"})
        # Its tests run the portable kernels alone, the others both.
        self.assertIn("4 ok with the portable kernels alone", steps["tests"]["reason"])
        self.assertIn("8 ok", steps["tests"]["reason"])

    def test_a_test_that_hangs_runs_again_with_portable_kernels(self):
        visit = self.ended("gpu=watchdog@attention", steps=["tests"])
        tests = visit.steps()["tests"]
        lost = [why for why in tests["failures"].values() if why.startswith("lost")]
        self.assertEqual(len(lost), 2, tests)
        self.assertIn("then: ok with the portable kernels alone", lost[0])
        self.assertIn("4 ok,", tests["reason"])
        self.assertEqual((len(tests["alone"]), tests["not_run"]), (6, []))

    def test_a_crash_takes_its_family_alone(self):
        visit = self.ended("smoke=crash@layer_norm headline=crash@qkv_lora", steps=["smoke", "headline"])
        steps = visit.steps()
        self.assertEqual(set(steps["smoke"]["failures"]), {"layer_norm"})
        self.assertIn("status -11", steps["smoke"]["failures"]["layer_norm"])
        self.assertEqual({row["family"] for row in steps["headline"]["rows"]}, {"attention_global_64"})
        self.assertEqual(steps["headline"]["result"], "failed")
        self.assertIn("status -11", steps["headline"]["failures"]["qkv_lora forward batch 1 grid 64"])

    def test_tests_that_crash_are_named(self):
        steps = self.ended("gpu=crash@lora_qkv", steps=["tests"]).steps()
        self.assertEqual(len([name for name in steps["tests"]["failures"] if "lora_qkv" in name]), 4)
        self.assertIn("8 ok", steps["tests"]["reason"])

    def test_wrong_numbers_are_left_out_of_measurements(self):
        visit = self.ended("smoke=wrong@attention_global_64", steps=["smoke", "headline", "profile"])
        steps = visit.steps()
        self.assertIn("error 0.5, bound 0.008", steps["smoke"]["failures"]["attention_global_64"])
        self.assertEqual({row["family"] for row in steps["headline"]["rows"]}, {"qkv_lora", "layer_norm"})
        self.assertIn("attention_global_64 is wrong", steps["profile"]["failures"]["rel_pos_attention_fwd_sm90"])

    def test_lies_are_found(self):
        steps = self.ended("smoke=lie@qkv_lora gpu=lie headline=lie@layer_norm", steps=MAIN).steps()
        self.assertIn("3 of 10 runs", steps["smoke"]["failures"]["qkv_lora"])
        self.assertTrue(any("passed" in why and "showed" in why for why in steps["tests"]["failures"].values()))
        self.assertIn("layer_norm forward batch 1 grid 64", steps["headline"]["failures"])

    def test_half_a_line_is_no_result(self):
        steps = self.ended("smoke=half gpu=half headline=half", steps=MAIN).steps()
        self.assertEqual(set(steps["smoke"]["failures"]), {"attention_global_64", "qkv_lora", "layer_norm"})
        self.assertEqual((steps["tests"]["result"], steps["headline"]["result"]), ("failed", "failed"))

    def test_a_full_disk_is_told(self):
        visit = self.ended("headline=full", steps=["headline", "profile"])
        self.assertIn("log.txt is not whole: No space left on device", visit.out)
        self.assertIn("| headline | passed |", visit.out)
        self.assertEqual(self.results(visit)["headline"], "passed")

    def test_a_flood_is_stopped(self):
        visit = self.ended("headline=flood", steps=["headline"])
        self.assertIn("said more than", str(visit.steps()["headline"]))
        size = sum(file.stat().st_size for file in visit.results.iterdir())
        self.assertLess(size, 1 << 20)

    def test_a_killed_kit_leaves_whole_files(self):
        for _ in range(2):
            visit = self.visit("smoke=slow@qkv_lora", steps=["warm", "smoke"])
            deadline = time.monotonic() + SECONDS
            while time.monotonic() < deadline:
                with contextlib.suppress(OSError):
                    if visit.steps().get("smoke", {}).get("rows"):
                        break
                time.sleep(0.01)
            os.killpg(visit.process.pid, signal.SIGKILL)
            visit.process.communicate()
            self.assertEqual(visit.steps()["warm"]["result"], "passed")
            self.assertTrue(visit.steps()["smoke"]["rows"])
            self.assertIn("| warm | passed |", (visit.results / "results.md").read_text())


if __name__ == "__main__":
    unittest.main()
