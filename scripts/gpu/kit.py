#!/usr/bin/env python3
"""Runs the GPU kit: tests, the fine-tuning example, benchmarks beside PyTorch, compute-sanitizer on the small cases.

    run.sh                                    everything, into results/
    run.sh --seconds 560 --results DIR        what fits into this time, each step its share
    run.sh --seconds 560 bench                one step alone
    run.sh --seconds 560 tune                 measures tiles and writes the table measured.rs
    run.sh --seconds 300 profile              Nsight Compute on the kernels that count, into profile.txt

Steps, in this order: tests, finetune, bench, sanitizers; tune and profile only if they are named. Writes results.json and
results.md after every step, so that what was done is kept whatever happens, log.txt with what the programs said, and
from the benchmarks bench.json and performance.md. What is not there (compute-sanitizer, ncu, torch) is left out, and the
report says so. Without a GPU it says that and ends well; the exit status is 1 if anything failed.
"""

import argparse
import collections
import concurrent.futures
import datetime
import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

KIT = pathlib.Path(__file__).resolve().parent
# Each step's share of the time; what one leaves goes to the next.
SHARES = {"tests": 45, "finetune": 5, "bench": 30, "sanitizers": 20, "tune": 50, "profile": 20}
# Run only when named.
EXTRA = ("tune", "profile")
# Cases of which a profile says why they take as long as they do.
PROFILED = ["attention_forward", "attention_train", "windowed_layer_forward", "qkv_lora", "windowed_layer_train"]
WRITTEN = ["results.json", "results.md", "log.txt", "bench.json", "performance.md"]
WRITTEN += ["measured.rs", "tiles.json", "profile.txt"]
TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
# A process that takes longer than this hangs.
LONGEST = 300


class Done(NamedTuple):
    """How a process ended. `status`: the exit status, minus the signal, or none if it was stopped."""

    status: int | None
    out: str
    err: str

    def reason(self):
        if self.status is None:
            return "stopped, out of time"
        said = (self.err.strip() or self.out.strip() or "it said nothing").splitlines()
        return f"status {self.status}: {said[-1]}"


class Kit:
    def __init__(self, args):
        self.folder = args.results.absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        for name in WRITTEN:
            (self.folder / name).unlink(missing_ok=True)
        self.start = time.monotonic()
        self.seconds, self.wanted = args.seconds, args.steps or [step for step in SHARES if step not in EXTRA]
        self.environment = dict(os.environ, CANDLE_SAM_LORA_FIXTURES=str(KIT / "tests/fixtures"))
        self.environment["LD_LIBRARY_PATH"] = ":".join(libraries())
        # The driver compiles candle's kernels for this GPU, once if it may keep them.
        self.environment.setdefault("CUDA_CACHE_PATH", str(KIT / "cache"))
        self.results = {
            "version": (KIT / "VERSION").read_text().strip(),
            "build": (KIT / "BUILD").read_text().strip(),
            "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            "device": "",
            "steps": {},
        }

    def left(self):
        return self.start + self.seconds - time.monotonic()

    def deadline(self, step):
        """When a step has to end."""
        shares = [(name, SHARES[name]) for name in SHARES if name in self.wanted]
        until = sum(share for name, share in shares[: [name for name, _ in shares].index(step) + 1])
        return self.start + self.seconds * until / sum(share for _, share in shares)

    def run(self, command, until, limit=LONGEST):
        """Runs a program until it ends or the time is over; what it said goes to the log, too."""
        command = [str(word) for word in command]
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            process = subprocess.Popen(
                command, cwd=KIT, env=self.environment, stdout=out, stderr=err, start_new_session=True
            )
            try:
                status = process.wait(max(0, min(limit, until - time.monotonic())))
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                status = None
            texts = []
            for stream in (out, err):
                stream.seek(0)
                texts.append(stream.read().decode(errors="replace"))
        done = Done(status, *texts)
        with open(self.folder / "log.txt", "a") as log:
            log.write(f"\n$ {' '.join(command)}\n{ends(done.out)}{ends(done.err)}status: {done.status}\n")
        return done

    def note(self, step, result, **details):
        """Notes how a step ended, and writes everything so far."""
        self.results["steps"][step] = {"result": result, **details}
        (self.folder / "results.json").write_text(json.dumps(self.results, indent=1) + "\n")
        (self.folder / "results.md").write_text(report(self.results))
        reason = details.get("reason")
        print(f"{step}: {result}" + (f" ({reason})" if reason else ""), flush=True)


def ends(text, most=20_000):
    """Both ends of a long text."""
    return text if len(text) <= most else text[: most // 2] + "\n[...]\n" + text[-most // 2 :]


def libraries():
    """Where CUDA's libraries may be: those that came with PyTorch, the toolkit's, the driver's."""
    folders = os.environ.get("LD_LIBRARY_PATH", "").split(":")
    try:
        import nvidia

        folders += sorted(str(lib) for base in nvidia.__path__ for lib in pathlib.Path(base).glob("*/lib"))
    except ImportError:
        pass
    folders += ["/usr/local/cuda/lib64", "/usr/local/nvidia/lib64", "/usr/local/cuda/compat"]
    return [folder for folder in folders if folder and os.path.isdir(folder)]


def events(text):
    """The JSON objects of a text with one a line."""
    for line in text.splitlines():
        if line.startswith("{"):
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                pass  # a line that was cut off


def outcomes(text):
    """{name: (event, message)} of the tests that ended."""
    ended = [e for e in events(text) if e.get("type") == "test" and e.get("event") != "started"]
    return {e["name"]: (e["event"], e.get("stdout", "").strip()) for e in ended}


def of_group(kit, until, group, names):
    """{name: (event, message)} of tests that share a word. One that kills its process is left out of the next."""
    ended = {}
    for _ in range(4):
        skipped = [word for name in ended if ended[name][0] == "lost" for word in ("--skip", name)]
        done = kit.run(["./gpu", "--test", "--format", "json", *skipped, group], until, limit=120)
        ended |= outcomes(done.out)
        missing = [name for name in names if name not in ended]
        begun = [e["name"] for e in events(done.out) if e.get("event") == "started" and e.get("name") in missing]
        if begun:
            ended[begun[-1]] = ("lost", done.reason())
        if not begun or time.monotonic() > until:
            break
    return ended | {name: ("not run", done.reason()) for name in missing if name not in ended}


def tests(kit, until):
    """Every test, an operation's in a process of their own: one that takes the GPU down takes no others along."""
    listed = kit.run(["./gpu", "--list"], until).out.splitlines()
    names = [line.removesuffix(": test") for line in listed if line.endswith(": test")]
    groups = collections.defaultdict(list)
    for name in names:
        first, rest = name.split(" ", 1)
        of_operation = first in ("values", "gradients", "strides", "repeat", "streams")
        groups[rest.rsplit(" ", 1)[0] if of_operation else first + " "].append(name)
    ended = {}
    with concurrent.futures.ThreadPoolExecutor(max(1, min(8, (os.cpu_count() or 2) // 2))) as pool:
        for outcome in pool.map(lambda group: of_group(kit, until, group, groups[group]), groups):
            ended |= outcome
    count = collections.Counter(event for event, _ in ended.values())
    failures = {name: f"{event}: {why}" for name, (event, why) in ended.items() if event not in ("ok", "ignored")}
    reason = ", ".join(f"{number} {event}" for event, number in sorted(count.items()))
    kit.note("tests", "passed" if count["ok"] and not failures else "failed", reason=reason, failures=failures)


def finetune(kit, until):
    """The example, shortened, from images to an adapter."""
    nuclei = KIT / "assets/photos/nuclei"
    with tempfile.TemporaryDirectory() as output:
        command = ["./finetune", "--device", "cuda", "--model", KIT / "assets/tiny-sam", "--steps", 60]
        for option, part in [("", "train"), ("val-", "heldout")]:
            command += [f"--{option}images", nuclei / part / "images", f"--{option}masks", nuclei / part / "masks"]
        done = kit.run([*command, "--output", output], until)
        adapter = pathlib.Path(output) / "adapter/adapter_model.safetensors"
        metrics = pathlib.Path(output) / "metrics.json"
        good = done.status == 0 and adapter.exists() and metrics.exists()
        if not good:
            return kit.note("finetune", "failed", reason=done.reason())
        kit.note("finetune", "passed", metrics=json.loads(metrics.read_text()))


def bench(kit, until):
    """This crate and PyTorch in turns, each measurement a process of its own."""
    seconds = until - time.monotonic()
    command = [sys.executable, "benches/report/run.py", "--device", "cuda", "--executable", KIT / "cases"]
    command += ["--out", kit.folder / "bench.json", "--document", kit.folder / "performance.md"]
    done = kit.run([*command, "--seconds", f"{seconds - 5:.0f}"], until, limit=seconds)
    rows = []
    if (kit.folder / "bench.json").exists():
        rows = json.loads((kit.folder / "bench.json").read_text())["rows"]
    reason = f"{len(rows)} comparisons" if done.status == 0 else done.reason()
    kit.note("bench", "passed" if done.status == 0 else "failed", reason=reason, rows=rows)


def sanitizers(kit, until):
    """The gradients of all operations under every tool, side by side: they are slow."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return kit.note("sanitizers", "skipped", reason="compute-sanitizer is not installed")
    with concurrent.futures.ThreadPoolExecutor(len(TOOLS)) as pool:
        command = [program, "--error-exitcode", 99, "--print-limit", 20, "--tool"]
        test = ["./gpu", "--test", "--format", "json", "gradients"]
        work = {tool: pool.submit(kit.run, [*command, tool, *test], until, limit=LONGEST * 4) for tool in TOOLS}
        for tool, future in work.items():
            done = future.result()
            said = done.out + done.err
            count = collections.Counter(event for event, _ in outcomes(done.out).values())
            findings = [line for line in said.splitlines() if line.startswith("=========")]
            summary = next((line.strip("= ") for line in reversed(findings) if "SUMMARY" in line), None)
            ran = f"{count['ok']} tests passed, {count['failed']} failed"
            if done.status is None:
                kit.note(tool, "stopped", reason=f"out of time; {ran}")
            elif not count["ok"] and summary is None:
                kit.note(tool, "skipped", reason=f"the tool does not work here: {done.reason()}")
            else:
                good = done.status == 0 and count["ok"] > 0
                kit.note(tool, "passed" if good else "failed", reason=f"{summary}; {ran}", findings=findings[:60])


def tune(kit, until):
    """The fastest tiles, as the table that src/launch/measured.rs is."""
    seconds = until - time.monotonic()
    about = f"{kit.results['device'] or 'a GPU'}, version {kit.results['version']}, {kit.results['date']}"
    command = ["./tune", "--seconds", f"{max(1, seconds - 20):.0f}", "--about", about]
    command += ["--table", kit.folder / "measured.rs", "--json", kit.folder / "tiles.json"]
    done = kit.run(command, until, limit=seconds)
    good = done.status == 0
    reason = (done.out.strip().splitlines() or [""])[-1] if good else done.reason()
    kit.note("tune", "passed" if good else "failed", reason=reason)


def profile(kit, until):
    """What bounds each of our kernels, by Nsight Compute; the clocks stay as they are."""
    program = shutil.which("ncu") or shutil.which("ncu", path="/usr/local/cuda/bin")
    if program is None:
        return kit.note("profile", "skipped", reason="ncu is not installed")
    sections = ["SpeedOfLight", "WarpStateStats", "MemoryWorkloadAnalysis", "Occupancy", "LaunchStats"]
    command = [program, "--clock-control", "none", "--kernel-name", "regex:^(rel_pos|projection|low_rank)"]
    command += [word for section in sections for word in ("--section", section)] + ["--launch-count", "12", "./cases"]
    kit.environment["CANDLE_SAM_DEVICE"] = "cuda"
    profiled, reason = [], "out of time"
    for case in PROFILED:
        if time.monotonic() > until:
            break
        done = kit.run([*command, "--case", case, "--dtype", "bf16", "--batch", 4, "--reps", 1], until)
        if done.status == 0:
            profiled.append(case)
            with open(kit.folder / "profile.txt", "a") as file:
                file.write(f"# {case}\n{done.out}\n")
        else:
            reason = done.reason()
    reason = ", ".join(profiled) if profiled else reason
    kit.note("profile", "passed" if profiled else "failed", reason=reason)


def report(results):
    """The results as Markdown."""
    lines = [f"# {results['device'] or 'GPU'}", "", f"Version {results['version']}, {results['date']}."]
    lines += ["", results["build"], "", "| step | result | |", "|---|---|---|"]
    steps = results["steps"]
    lines += [f"| {name} | {step['result']} | {step.get('reason', '')} |" for name, step in steps.items()]
    if found := steps.get("tests", {}).get("failures"):
        lines += ["", "## Failures", ""] + [f"- {name}: {message}" for name, message in found.items()]
    for name in TOOLS:
        step = steps.get(name, {})
        if step.get("result") == "failed" and (findings := step.get("findings")):
            lines += ["", f"## {name}", "", "```", *findings, "```"]
    if rows := steps.get("bench", {}).get("rows"):
        lines += ["", "| case | | ours | peer | | ratio |", "|---|---|---|---|---|---|"]
        keys = ("case", "metric", "ours", "peer", "peer_name", "ratio")
        lines += ["| " + " | ".join("" if row[key] is None else str(row[key]) for key in keys) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def probe(kit):
    """Whether there is a GPU to run on; else notes why not."""
    done = kit.run(["./gpu", "no such test"], kit.start + kit.seconds)
    if done.status != 0:
        kit.note("start", "failed", reason=f"the program does not start: {done.reason()}")
    elif done.out.startswith("skipped"):
        kit.note("start", "skipped", reason=done.out.strip().removeprefix("skipped: "))
    else:
        query = "--query-gpu=name,driver_version,compute_cap,memory.total,clocks.max.sm"
        try:
            kit.results["device"] = kit.run(["nvidia-smi", query, "--format=csv,noheader"], kit.start + 30).out.strip()
        except FileNotFoundError:
            pass  # no name, then
        return True
    return False


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[[], *SHARES], metavar="STEP", help="all by default")
    parser.add_argument("--results", type=pathlib.Path, default=KIT / "results", metavar="DIR")
    parser.add_argument("--seconds", type=float, default=3600, help="for everything together")
    kit = Kit(parser.parse_args())
    if probe(kit):
        kit.environment["CANDLE_SAM_LORA_REQUIRE_GPU"] = "1"
        for step in (tests, finetune, bench, sanitizers, tune, profile):
            name = step.__name__
            if name not in kit.wanted:
                continue
            if kit.left() < 10:
                kit.note(name, "not run", reason="out of time")
                continue
            start = time.monotonic()
            try:
                step(kit, kit.deadline(name))
            except Exception as error:  # a step that dies takes no other along
                kit.note(name, "failed", reason=f"{type(error).__name__}: {error}")
            print(f"   {time.monotonic() - start:.0f} s", flush=True)
    print((kit.folder / "results.md").read_text())
    sys.exit(any(step["result"] == "failed" for step in kit.results["steps"].values()))


if __name__ == "__main__":
    main()
