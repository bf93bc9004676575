#!/usr/bin/env python3
"""Runs the GPU kit: whether the kernels are right, how fast they are beside PyTorch, and why.

    run.sh --plan short --results DIR     ten minutes, the most important questions first

    run.sh                                everything, an hour, into target/gpu-results

    run.sh --seconds 300 smoke headline   these steps alone

Every step has a time at which it ends; what one leaves over goes to the next. After each line that a step produces, the kit
writes results.json and results.md. They are whole whenever the kit is killed; log.txt is what the programs said. A family of
kernels that is wrong at SAM's sizes is left out of all measurements, and the others go on. A missing tool
(compute-sanitizer, ncu, torch) skips its step, and the report says so. Without a GPU the kit says that and ends well; the exit
status is 1 if anything failed.
"""

import argparse
import os
import pathlib
import resource
import sys
import time

import checks
import measure
from process import Runner, libraries
from results import Results, report

TREE = pathlib.Path(__file__).resolve().parents[2]
STEPS = [checks.warm, checks.smoke, measure.headline, measure.peers, measure.profile, checks.tests]
STEPS += [measure.finetune, measure.bench, checks.sanitizers]
STEPS = {step.__name__: step for step in STEPS}
# The steps of a plan in their order, each with its share of the time.
PLANS = {
    "short": dict(warm=45, smoke=50, headline=145, peers=60, profile=75, tests=135, sanitizers=60),
    "full": dict(warm=2, smoke=6, tests=40, headline=20, peers=8, finetune=6, bench=80, profile=10, sanitizers=68),
}
SECONDS = {"short": 570, "full": 3600}
# No program of the kit writes larger files: one that runs wild shall not fill the disk.
LARGEST_FILE = 1 << 30


class Kit:
    """The state that steps share: programs, results, and the faults of kernel families so far."""

    def __init__(self, args):
        self.tree, self.folder, self.plan = TREE, args.kit.absolute(), args.plan
        self.sizes, self.watchdog = (["--small"] if args.small else []), args.watchdog
        read = lambda name: (self.folder / name).read_text().strip()
        self.results = Results(args.results.absolute(), read("VERSION"), read("BUILD"), args.plan)
        # {family: why}: not to be measured. Families that hang, of which tests run the portable kernels alone.
        self.wrong, self.hangs = {}, set()
        self.start, self.seconds = time.monotonic(), args.seconds or SECONDS[args.plan]
        shares = PLANS[args.plan]
        self.shares = {name: shares.get(name, 60) for name in args.steps} if args.steps else shares
        environment = dict(os.environ, CANDLE_SAM_LORA_FIXTURES=str(TREE / "tests/fixtures"))
        environment |= {"LD_LIBRARY_PATH": ":".join(libraries()), "CANDLE_SAM_LORA_WATCHDOG": str(self.watchdog)}
        # The driver compiles candle's kernels for this GPU, once if it may keep them.
        environment.setdefault("CUDA_CACHE_PATH", str(self.folder / "cache"))
        self.runner = Runner(self.tree, environment, self.results.log)
        self.run = self.runner.run

    def program(self, name):
        return self.folder / name

    def end(self):
        return self.start + self.seconds

    def deadline(self, step):
        """When a step has to end."""
        names = list(self.shares)
        until = sum(self.shares[name] for name in names[: names.index(step) + 1])
        return self.start + self.seconds * until / sum(self.shares.values())

    def probe(self):
        """Whether there is a GPU to run on; else notes why not."""
        done = self.run([self.program("gpu"), "no such test"], self.end(), limit=60)
        if done.status != 0:
            self.results.note("start", "failed", reason=f"the program does not start: {done.reason()}")
        elif done.out.startswith("skipped"):
            self.results.note("start", "skipped", reason=done.out.strip().removeprefix("skipped: "))
        else:
            self.results.all["device"] = self.device()
            return True
        return False

    def device(self):
        """Name, driver, clocks and power, if nvidia-smi is there."""
        query = "--query-gpu=name,driver_version,compute_cap,memory.total,clocks.sm,clocks.max.sm,power.draw,power.limit"
        try:
            done = self.run(["nvidia-smi", query, "--format=csv,noheader"], self.end(), limit=20)
        except OSError:
            return ""
        return done.out.strip() if done.status == 0 else ""

    def step(self, name):
        if self.end() - time.monotonic() < min(3, self.seconds / 20):
            return self.results.note(name, "not run", reason="out of time")
        begun = time.monotonic()
        try:
            STEPS[name](self, self.deadline(name))
        except Exception as error:  # a step that dies takes no other along
            kept = self.results.all["steps"].get(name, {})
            self.results.note(name, **kept | {"result": "failed", "reason": f"{type(error).__name__}: {error}"})
        print(f"   {time.monotonic() - begun:.0f} s, at {time.monotonic() - self.start:.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", choices=[[], *STEPS], metavar="STEP", help=f"of {', '.join(STEPS)}")
    parser.add_argument("--plan", choices=PLANS, default="full")
    parser.add_argument("--results", type=pathlib.Path, default=TREE / "target/gpu-results", metavar="DIR")
    parser.add_argument("--seconds", type=float, help="for everything together, the plan's by default")
    parser.add_argument("--kit", type=pathlib.Path, required=True, metavar="DIR", help="where bundle.sh's archive is unpacked")
    parser.add_argument("--watchdog", type=float, default=10, metavar="S", help="a process without progress hangs")
    parser.add_argument("--small", action="store_true", help="small sizes everywhere, for the emulator")
    args = parser.parse_args()
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if hard == resource.RLIM_INFINITY or hard > LARGEST_FILE:
        resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, hard))
    kit = Kit(args)
    if kit.probe():
        kit.runner.environment["CANDLE_SAM_LORA_REQUIRE_GPU"] = "1"
        for name in kit.shares:
            kit.step(name)
    kit.results.write()
    print(report(kit.results.all))
    for name, why in kit.results.unwritten.items():
        print(f"error: {kit.results.folder / name} is not whole: {why}")
    sys.exit(1 if kit.results.failed() else 0)


if __name__ == "__main__":
    main()
