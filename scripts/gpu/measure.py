"""How fast the kernels are, beside PyTorch's, why, and with which tiles."""

import importlib.util
import json
import math
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time

from checks import words
from process import BROKEN, HANGS, event

# Kernels to profile: the case of benches/cases.rs that launches each, and its family in the smoke test.
PROFILED = [
    ("rel_pos_attention_fwd_sm90", "attention_forward", "attention_global_64"),
    ("rel_pos_attention_bwd_query_sm90", "attention_train", "attention_global_64"),
    ("rel_pos_attention_bwd_key_sm90", "attention_train", "attention_global_64"),
    ("projection_fwd_sm90", "lin1_forward", "lin1_gelu"),
    ("rel_pos_attention_window_bwd_sm90", "windowed_layer_train", "attention_windows_64"),
]
SECTIONS = ["SpeedOfLight", "WarpStateStats", "SchedulerStats", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats"]
# The benchmarks' cases that a family's kernels are in, by what their names contain.
IN_BENCH = {
    "attention_global_64": ["attention_", "global_layer", "encoder"],
    "attention_windows_64": ["windowed_layer", "encoder"],
    "qkv_lora": ["qkv_", "linear_forward", "_layer", "encoder"],
    "lin1_gelu": ["lin1_forward", "encoder"],
    "lin2": ["encoder"],
    "layer_norm": ["encoder"],
    "attention_global_80": ["model=h"],
    "attention_windows_80": ["model=h"],
}


class Clocks:
    """The clock of the multiprocessors and the power, read by nvidia-smi while it is entered; nothing where it is not."""

    def __init__(self):
        self.samples, self.process, self.first = [], None, threading.Event()

    def __enter__(self):
        command = ["nvidia-smi", "--query-gpu=clocks.sm,power.draw", "--format=csv,noheader,nounits", "-lms", "50"]
        try:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        except OSError:
            return self
        threading.Thread(target=self.read, daemon=True).start()
        self.first.wait(3)  # it takes its time to begin
        return self

    def read(self):
        for line in self.process.stdout:
            try:
                mhz, watts = (float(word) for word in line.split(","))
            except ValueError:
                continue  # a number that it does not know here
            self.samples.append((time.time(), mhz, watts))
            self.first.set()

    def __exit__(self, *_):
        if self.process:
            self.process.kill()
            self.process.wait()

    def add_to(self, row):
        """The median over a measurement, or what was read last before its end."""
        if "until" not in row:
            return
        before = [sample for sample in self.samples if sample[0] <= row["until"]]
        within = [sample for sample in before if sample[0] >= row["from"]] or before[-1:]
        if within:
            row["sm_mhz"] = round(statistics.median(mhz for _, mhz, _ in within))
            row["watts"] = round(statistics.median(watts for _, _, watts in within))


def measured(kit, until, step, command, without):
    """Rows of a program that measures, each noted as it comes; and how the program ended. `without`: families that are
    left out, and after a crash the one that it came from."""
    rows, without = {}, list(without)
    with Clocks() as clocks:
        while True:
            begun = None

            def on_line(line):
                nonlocal begun
                if (row := event(line)) is None:
                    return
                begun = row.get("begun", begun)
                if "name" in row:
                    row = whole(row)
                    clocks.add_to(row)
                    rows[row["name"], row.get("kernels"), row.get("tile"), row.get("implementation")] = row
                    kit.results.note(step, "running", rows=list(rows.values()))

            done = kit.run([*command, *words("--without", without)], until, on_line=on_line)
            if done.status in (None, 0, 1) or begun is None or begun in without:
                return list(rows.values()), done
            without.append(begun)
            if done.status in (HANGS, BROKEN):
                kit.hangs.add(begun)
            kit.wrong.setdefault(begun, f"{step}: {done.reason()}")


def whole(row):
    """The row, or one that says that it is not a measurement."""
    numbers = ["from", "until", *(["us", "least_us", "most_us", "tflops"] if "failed" not in row else [])]
    good = all(isinstance(row.get(name), (int, float)) and 0 < row[name] < math.inf for name in numbers)
    good = good and ("implementation" in row or {"family", "kernels", "tile", "batch", "grid", "tables"} <= row.keys())
    if good:
        return row
    return {"name": str(row["name"]), "kernels": str(row.get("kernels")), "failed": f"no measurement: {row}"}


def headline(kit, until):
    """Our layers by CUDA events, with every tile, in one process."""
    command = [kit.program("headline"), *kit.sizes]
    listed = kit.run([*command, "--list", *words("--without", kit.wrong)], until)
    expected = [line for line in listed.out.splitlines() if line]
    left_out = sorted(kit.wrong)
    rows, done = measured(kit, until, "headline", command, left_out)
    failures = {row["name"]: row["failed"] for row in rows if "failed" in row}
    missing = [name for name in expected if name not in {row["name"] for row in rows if "us" in row}]
    why = lambda name: kit.wrong.get(name.split()[0]) or (done.reason() if done.status != 0 else "nothing was said of it")
    failures |= {name: f"not measured: {why(name)}" for name in missing if name not in failures}
    good = done.status == 0 and rows and not failures
    reason = f"{len(rows)} times, {len(expected) - len(missing)} of {len(expected)} measurements"
    reason += f"; left out: {', '.join(left_out)}" if left_out else ""
    kit.results.note("headline", "passed" if good else "failed", reason=reason, rows=rows, failures=failures)


def peers(kit, until):
    """PyTorch on the same layers, in one process."""
    if importlib.util.find_spec("torch") is None:
        return kit.results.note("peers", "skipped", reason="torch is not installed")
    command = [sys.executable, kit.tree / "benches/peers/headline.py", *kit.sizes]
    rows, done = measured(kit, until, "peers", command, [])
    failures = {f"{row['name']} {row['implementation']}": row["failed"] for row in rows if "failed" in row}
    good = done.status == 0 and rows and not failures
    reason = f"{len(rows)} times" if done.status in (0, 1) else f"{len(rows)} times; {done.reason()}"
    kit.results.note("peers", "passed" if good else "failed", reason=reason, rows=rows, failures=failures)


def profile(kit, until):
    """The bounds of our kernels, by Nsight Compute; the clocks stay as they are."""
    program = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if program is None:
        return kit.results.note("profile", "skipped", reason="ncu is not installed")
    command = [program, "--clock-control", "none", "--launch-skip", 3, "--launch-count", 1]
    command += words("--section", SECTIONS)
    profiled, failures = [], {}
    for number, (kernel, case, family) in enumerate(PROFILED):
        if family in kit.wrong:
            failures[kernel] = f"{family} is wrong"
            continue
        now = time.monotonic()
        share = now + (until - now) / (len(PROFILED) - number)
        case = [kit.program("cases"), "--case", case, "--dtype", "bf16", "--batch", 1, "--reps", 4]
        done = kit.run([*command, "--kernel-name", f"regex:^{kernel}", *case], share, CANDLE_SAM_DEVICE="cuda")
        if done.status == 0 and kernel in done.out:
            profiled.append(kernel)
            with open(kit.results.folder / "profile.txt", "a") as file:
                file.write(f"# {kernel}\n{done.out}\n")
        else:
            failures[kernel] = done.reason()
    reason = f"{len(profiled)} of {len(PROFILED)} kernels"
    kit.results.note("profile", "passed" if profiled else "failed", reason=reason, failures=failures)


def bench(kit, until):
    """This crate and PyTorch in turns, each measurement a process of its own."""
    seconds = until - time.monotonic()
    command = [sys.executable, "benches/report/run.py", "--device", "cuda", "--executable", kit.program("cases")]
    command += ["--out", kit.results.folder / "bench.json", "--document", kit.results.folder / "performance.md"]
    command += words("--without", sorted({name for family in kit.wrong for name in IN_BENCH.get(family, [])}))
    done = kit.run([*command, "--seconds", f"{max(1, seconds - 5):.0f}"], until, limit=seconds)
    rows = []
    if (kit.results.folder / "bench.json").exists():
        rows = json.loads((kit.results.folder / "bench.json").read_text())["rows"]
    reason = f"{len(rows)} comparisons" if done.status == 0 else done.reason()
    kit.results.note("bench", "passed" if done.status == 0 else "failed", reason=reason, rows=rows)


def finetune(kit, until):
    """The command, shortened, from images to an adapter."""
    nuclei = kit.tree / "assets/photos/nuclei"
    with tempfile.TemporaryDirectory() as output:
        command = [kit.program("finetune"), "--device", "cuda", "--model", kit.tree / "assets/tiny-sam", "--steps", 60]
        for option, part in [("", "train"), ("val-", "heldout")]:
            command += [f"--{option}images", nuclei / part / "images", f"--{option}masks", nuclei / part / "masks"]
        done = kit.run([*command, "--output", output], until)
        adapter = pathlib.Path(output) / "adapter/adapter_model.safetensors"
        metrics = pathlib.Path(output) / "metrics.json"
        if not (done.status == 0 and adapter.exists() and metrics.exists()):
            return kit.results.note("finetune", "failed", reason=done.reason())
        kit.results.note("finetune", "passed", metrics=json.loads(metrics.read_text()))
