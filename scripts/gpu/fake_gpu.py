#!/usr/bin/env python3
"""Stands in for the programs of the GPU kit, and for nvidia-smi, ncu and compute-sanitizer. With it test_kit.py sees what the
kit makes of programs that hang, crash, lie, and fill the disk.

`FAKE` says how each program behaves, as `smoke=hang headline=crash`; one that it does not name behaves well. Behaviours end
in `@FAMILY` where they are one family's alone.
"""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

FAMILIES = ["attention_global_64", "qkv_lora", "layer_norm"]
TESTS = [
    f"{kind} {case} {dtype}"
    for kind in ("gradients", "values")
    for case in ("attention 1x3x64 window None heads 2", "attention 1x16x20 window Some(14)", "lora_qkv 1793 384 (16, 4)")
    for dtype in ("bf16", "f32")
]
PORTABLE = os.environ.get("CANDLE_SAM_LORA_TEST_KERNELS") == "portable"
NAME = pathlib.Path(sys.argv[0]).name
BEHAVIOURS = dict(word.split("=") for word in os.environ.get("FAKE", "").split())


def say(**line):
    print(json.dumps(line), flush=True)


def misbehave(family=""):
    """As FAKE has it for this program and family; lies are the caller's."""
    behaviour, _, only = BEHAVIOURS.get(NAME, "").partition("@")
    if only and only != family or bool(family) != bool(only):
        return None
    if behaviour == "hang":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        subprocess.Popen(["sleep", "60"])  # holds the pipe open
        time.sleep(60)
    elif behaviour == "watchdog" and not PORTABLE:
        print(f"{family}: no progress for 10 s, the GPU hangs", file=sys.stderr)
        os._exit(71)
    elif behaviour == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    elif behaviour == "half":
        print('{"family": "layer_norm", "kernels": "Native", "ok": tr', end="", flush=True)
        os._exit(0)
    elif behaviour == "flood":
        while True:
            print("x" * 65536)
    elif behaviour == "full":
        results = pathlib.Path(os.environ["FAKE_RESULTS"])
        for name in ("results.json.part", "results.md.part", "log.txt"):
            (results / name).unlink(missing_ok=True)
            (results / name).symlink_to("/dev/full")
    elif behaviour == "slow":
        time.sleep(0.3)
    return behaviour


def arguments(option):
    return [value for word, value in zip(sys.argv, sys.argv[1:]) if word == option]


def smoke():
    names = arguments("--only") or FAMILIES
    if "--list" in sys.argv:
        return print("\n".join(names))
    here = ["Portable"] if PORTABLE else ["Native", "Portable"]
    say(kernels_here=here)
    misbehave()
    for family in names:
        say(begun=family)
        for kernels in here:
            behaviour = misbehave(family)
            error = 0.5 if behaviour == "wrong" and kernels == "Native" else 1e-3
            # The liar's numbers contradict its `ok`.
            runs = 3 if behaviour == "lie" else 10
            outputs = [{"name": name, "error": error, "bound": 8e-3} for name in ("value", "gradient 0")]
            same = dict(runs=10, same_bits=runs, same_bits_in_turn=True)
            say(family=family, kernels=kernels, outputs=outputs, ok=behaviour != "wrong", seconds=0.5, **same)
    row = dict(family="projection", dtype="bf16", kernels="native", ok=True, worst="out 1.0e-3 <= 8.0e-3", failure=None)
    say(self_test=[row], ok=True, compiler="nvcc 13.5", seconds=0.02)


def headline():
    families = [family for family in FAMILIES if family not in arguments("--without")]
    for family in families:
        name = f"{family} forward batch 1 grid 64"
        if "--list" in sys.argv:
            print(name)
            continue
        say(begun=family)
        misbehave()
        us = -1.0 if misbehave(family) == "lie" else 130.0
        times = dict(us=us, least_us=us, most_us=us, tflops=400.0, runs=9, batch=1, grid=64, tables=True, tile=None)
        say(name=name, family=family, kernels="Native", **times, **{"from": time.time(), "until": time.time()})


def tests():
    if "--list" in sys.argv:
        return print("\n".join(f"{name}: test" for name in TESTS))
    if "no such test" in sys.argv:
        return None
    names = pathlib.Path(os.environ["CANDLE_SAM_LORA_TEST_NAMES"]).read_text().splitlines()
    say(type="suite", event="started", test_count=len(names))
    for name in names:
        say(type="test", event="started", name=name)
        misbehave()
        misbehave(name.split()[1])
        say(type="test", event="ok", name=name)
    passed = len(names) + 5 if BEHAVIOURS.get("gpu") == "lie" else len(names)
    say(type="suite", event="ok", passed=passed, failed=0)


def nvidia_smi():
    while "-lms" in sys.argv:
        print("1980, 400.0", flush=True)
        time.sleep(0.02)
    print("FAKE GPU, 580.0, 9.0, 1 MiB, 345 MHz, 1980 MHz, 75 W, 700 W")


def ncu():
    print(arguments("--kernel-name")[0].removeprefix("regex:^"))


def sanitizer():
    at = next(index for index, word in enumerate(sys.argv[1:], 1) if word.endswith("/gpu"))
    status = subprocess.run(sys.argv[at:]).returncode
    print("========= ERROR SUMMARY: 0 errors")
    sys.exit(status)


PROGRAMS = {"smoke": smoke, "headline": headline, "gpu": tests}
PROGRAMS |= {"nvidia-smi": nvidia_smi, "ncu": ncu, "compute-sanitizer": sanitizer, "cases": lambda: None}

if __name__ == "__main__":
    sys.exit(PROGRAMS[NAME]())
