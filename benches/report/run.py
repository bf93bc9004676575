"""Runs this crate and its peers in turns, joins the measurements into ratios, writes the results and the document.

    python -m venv venv && venv/bin/pip install -r benches/peers/requirements.txt
    venv/bin/python benches/report/run.py --out benches/results/cpu.json            an hour

    venv/bin/python benches/report/run.py --quick --out benches/results/cpu.json    ten minutes

    venv/bin/python benches/report/run.py --device cuda --out benches/results/gpu.json

Every measurement is a fresh process. On the CPU, each implementation runs under glibc's default allocator and under one that
keeps freed pages (`kept`). Mapping and unmapping large tensors can cost as much as the arithmetic. `--cases` restricts to
the cases whose name contains one of the words, `--peers` to such peers. With `--update` the results keep what is not
measured again. The machine should be idle: a process that had to share the CPUs is run again, and the calmest of three is
taken. The results are written after each comparison; `--seconds` ends the run in good order. With `--executable`, the case
runner that is there, neither Rust nor git is needed: the version is read from the file VERSION beside it.
"""

import argparse
import contextlib
import datetime
import json
import os
import platform
import shlex
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import comparisons
import document
from comparisons import DEFAULT, KEPT, Config
from rows import MOST_LOAD, rows_of

ROOT = Path(__file__).resolve().parents[2]
KEEP_PAGES = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "100000000000",
    "MALLOC_TOP_PAD_": "67108864",
}


def output(*command):
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def build():
    """The path of our case runner."""
    command = ["cargo", "bench", "--bench", "cases", "--no-run", "--message-format=json"]
    if os.environ.get("CARGO_FEATURES"):
        command += ["--features", os.environ["CARGO_FEATURES"]]
    lines = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    messages = (json.loads(line) for line in lines if line.startswith("{"))
    paths = [m["executable"] for m in messages if m.get("executable") and m["target"]["name"] == "cases"]
    return paths[-1]


def build_peer(*features):
    """The path of the runner of candle without this crate."""
    folder = ROOT / "benches/peers/candle"
    command = ["cargo", "build", "--release", "--manifest-path", str(folder / "Cargo.toml"), "--message-format=json"]
    # The executable of each set of features stays.
    command += ["--target-dir", str(folder / "target" / "-".join(["published", *features])), "--features", ",".join(features)]
    lines = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()
    messages = (json.loads(line) for line in lines if line.startswith("{"))
    return [m["executable"] for m in messages if m.get("executable")][-1]


def busy_seconds():
    """CPU time of the whole machine; none where the system does not tell."""
    try:
        fields = [int(word) for word in Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    except OSError:
        return None
    # user, nice, system, irq, softirq, steal
    return sum(fields[i] for i in (0, 1, 2, 5, 6, 7)) / os.sysconf("SC_CLK_TCK")


def children_seconds():
    times = os.times()
    return times.children_user + times.children_system


class Runner:
    def __init__(self, args, compared, start, commit):
        self.args, self.executable, self.commit = args, args.executable or build(), commit
        # Its comparisons are on the CPU; a machine that only has our executable does without.
        peers = {"published": (), "avx512": ("avx512",)} if args.device == "cpu" and not args.executable else {}
        wanted = {peer.program for comparison in compared for peer in comparison.peers if self.is_wanted(peer)}
        self.peers = {program: build_peer(*features) for program, features in peers.items() if program in wanted}
        self.end = start + args.seconds if args.seconds else float("inf")

    def is_wanted(self, peer):
        return not self.args.peers or any(word in peer.name for word in self.args.peers)

    def out_of_time(self):
        # A process takes some seconds to start.
        return time.monotonic() + 10 > self.end

    def command(self, comparison, config, reps):
        if config.program in ("candle", "beside"):
            command = [self.executable]
        elif config.program in self.peers:
            command = [self.peers[config.program]]
        else:
            command = [sys.executable, str(ROOT / "benches/peers/run.py"), "--device", self.args.device]
        options = {"reps": reps, **comparison.options, **dict(config.options)}
        if self.args.grid is not None:
            options["grid"] = self.args.grid
        command += ["--case", comparison.case, "--implementation", config.implementation]
        return command + [word for key, value in options.items() for word in (f"--{key}", str(value))]

    def run(self, comparison, config, reps):
        """One process, or the calmest of three if others disturb it."""
        runs = []
        while len(runs) < 3 and not self.out_of_time():
            run = self.run_once(comparison, config, reps)
            if run is None or run["others"] is None or run["others"] <= MOST_LOAD:
                return run
            runs.append(run)
        return min(runs, key=lambda run: run["others"], default=None)

    def run_once(self, comparison, config, reps):
        """One process; the keys it printed, and what is known of it from outside."""
        threads = str(self.args.threads)
        environment = dict(os.environ, CANDLE_SAM_DEVICE=self.args.device)
        environment |= {key: threads for key in ("RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        if config.allocator == KEPT:
            environment |= KEEP_PAGES
        busy, children, start = busy_seconds(), children_seconds(), time.monotonic()
        command = self.command(comparison, config, reps)
        limit = None if self.end == float("inf") else self.end - start
        try:
            done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"  {config.name}: stopped, out of time", flush=True)
            return None
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
            print(f"  {config.name}: failed: {reason}", flush=True)
            return None
        measured = json.loads(done.stdout.strip().splitlines()[-1])
        seconds = time.monotonic() - start
        others = None
        if busy is not None:
            ours = children_seconds() - children
            others = max(0.0, busy_seconds() - busy - ours) / seconds / os.cpu_count()
        run = {"comparison": comparison.name, "config": config.name, "commit": self.commit}
        run |= {"others": others, "measured": measured}
        wall = measured["wall_s"] or [measured["first_s"]]
        memory = measured.get("memory")
        print(
            f"  {config.name:44} {sorted(wall)[len(wall) // 2]:9.4f} s"
            + (f" {memory / 2**20:8.0f} MiB" if memory is not None else "")
            + (f"   warning: other processes took {others:.0%}" if others and others > MOST_LOAD else ""),
            flush=True,
        )
        return run

    def compare(self, comparison):
        """All implementations in turns."""
        slowness = 0 if self.args.quick else 1
        reps, rounds = comparison.reps[slowness], comparison.rounds[slowness]
        if self.args.reps is not None:
            reps, rounds = self.args.reps, 1
        runs = []
        print(f"{comparison.name} ({rounds} x {reps})", flush=True)
        for _ in range(rounds):
            for config in self.configs(comparison):
                if self.out_of_time():
                    return runs
                if run := self.run(comparison, config, reps):
                    runs.append(run)
        return runs

    def configs(self, comparison):
        if self.args.device != "cpu":
            return [Config("candle", "ours"), *comparison.peers]
        skipped = comparison.slow if self.args.quick else ()
        peers = [peer for peer in comparison.peers if peer not in skipped and self.is_wanted(peer)]
        peers = [peer for peer in peers if peer.program not in ("published", "avx512") or peer.program in self.peers]
        if comparison in comparisons.PROBES:
            peers = [Config("pytorch", "eager")] if comparison.case == "gemm_peak" else []
            return [Config("candle", "ours"), *peers]
        single = [*comparisons.LORA, *comparisons.SWEEPS, *comparisons.AVX2, comparisons.CHECKPOINTED]
        if comparison in single or "cpu" in comparison.options:
            return [Config("candle", "ours"), *peers]
        return [Config("candle", "ours", DEFAULT), *peers, Config("candle", "ours", KEPT)]


def head(args):
    """Where and with what."""
    cpu = platform.processor()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        field = lambda name: next(line.split(":")[1].strip() for line in lines if line.startswith(name))
        flags = field("flags").split()
        wide = [flag for flag in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]
        cpu = f"{field('model name')} family {field('cpu family')} model {field('model')} ({', '.join(wide)})"
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    machine = {"cpu": cpu, "cores": os.cpu_count(), "threads": args.threads, "memory_gib": round(memory, 1)}
    machine |= {"system": platform.platform(), "load_before": os.getloadavg()[0]}
    if args.device != "cpu":
        machine["gpu"] = output("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader")
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "peft", "openvino", "nncf", "onnxruntime"):
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    if args.executable:
        commit = (args.executable.parent / "VERSION").read_text().strip()
    else:
        locks = (ROOT / folder / "Cargo.lock" for folder in (".", "benches/peers/candle"))
        lock = [package for path in locks for package in path.read_text().split("[[package]]")]
        locked = lambda name: next(p.split('version = "')[1].split('"')[0] for p in lock if f'name = "{name}"\n' in p)
        crates = ("candle-sam-lora", "candle-core", "candle-transformers", "gemm")
        versions |= {name: locked(name) for name in crates} | {"rustc": output("rustc", "--version")}
        written = ("docs/performance", "benches/results")
        status = output("git", "status", "--porcelain").splitlines()
        changed = [line for line in status if not line.split()[-1].startswith(written)]
        commit = output("git", "rev-parse", "HEAD") + (" with changes" if changed else "")
    return {
        "machine": machine,
        "versions": versions,
        "commit": commit,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "benches/report/run.py", *sys.argv[1:]]),
    }


def earlier_runs(args, head):
    """The runs that the results hold; those of another machine or with another version are refused."""
    kept = json.loads(args.out.read_text())
    for group, key in (("machine", "cpu"), ("machine", "cores"), ("machine", "threads"), ("versions", "torch")):
        if kept["head"][group].get(key) != head[group].get(key):
            sys.exit(f"{args.out}: {key} was {kept['head'][group].get(key)}, here it is {head[group].get(key)}")
    commit = kept["head"]["commit"]
    return [{"commit": commit, **run} for run in kept["runs"]]


def joined(earlier, runs):
    """The earlier ones that were not made again, and all new ones."""
    key = lambda run: (run["comparison"], run["config"])
    again = {key(run) for run in runs}
    return [run for run in earlier if key(run) not in again] + runs


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "benches/results/cpu.json")
    parser.add_argument("--quick", action="store_true", help="one process each, few repetitions")
    parser.add_argument("--cases", nargs="*", help="only the cases that contain one of these words")
    parser.add_argument("--without", action="append", default=[], help="not the cases that contain this; may be repeated")
    parser.add_argument("--peers", nargs="*", help="only the peers whose name contains one of these words")
    parser.add_argument("--update", action="store_true", help="keep what --out has and this run does not measure again")
    parser.add_argument("--reps", type=int, help="repetitions, in one process each")
    parser.add_argument("--grid", type=int, help="all cases on small grids, say 8: to see that everything runs")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--document", type=Path, help="docs/performance.md, or performance-gpu.md, by default")
    parser.add_argument("--executable", type=Path, help="the benchmark `cases`, built already")
    parser.add_argument("--seconds", type=float, help="end before this time is over, whatever is left to do")
    args = parser.parse_args()
    if args.document is None:
        args.document = ROOT / ("docs/performance.md" if args.device == "cpu" else "docs/performance-gpu.md")
    if args.executable:
        args.executable = args.executable.absolute()
    compared = comparisons.CPU if args.device == "cpu" else comparisons.GPU
    wanted = [c for c in compared if not args.cases or any(word in c.name for word in args.cases)]
    wanted = [c for c in wanted if not any(word in c.name for word in args.without)]
    if not wanted:
        parser.error("no case has such a name")
    start = time.monotonic()
    before = head(args)
    runner, runs = Runner(args, wanted, start, before["commit"]), []
    earlier = earlier_runs(args, before) if args.update else []
    args.out.parent.mkdir(parents=True, exist_ok=True)
    for comparison in wanted:
        if runner.out_of_time():
            print(f"{comparison.name}: out of time", flush=True)
            continue
        runs += runner.compare(comparison)
        before["seconds"] = round(time.monotonic() - start)
        measured = joined(earlier, runs)
        rows = rows_of(measured, compared)
        if args.grid is not None:
            # The bars are for the cases' own shapes.
            rows = [row | {"bar": None, "holds": None} for row in rows]
        results = {"head": before, "rows": rows, "runs": measured}
        # Whole, whoever ends this process.
        part = args.out.with_suffix(".part")
        part.write_text(json.dumps(results, indent=1) + "\n")
        os.replace(part, args.out)
    if not runs:
        sys.exit("nothing was measured")
    document.write(results, args.out, args.document)
    missed = [row for row in results["rows"] if row["holds"] is False]
    print(document.table(results["rows"]))
    print(f"{args.out}, {args.document}: {len(missed)} bars missed, {before['seconds']} s")


if __name__ == "__main__":
    main()
