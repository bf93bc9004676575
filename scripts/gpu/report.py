#!/usr/bin/env python3
"""Writes results.json and results.md from what run.sh left in a folder. usage: report.py RESULTS"""

import json
import pathlib
import sys

STEPS = ["tests", "memcheck", "racecheck", "initcheck", "synccheck", "bench", "peers"]


def lines(path):
    """The JSON objects of a file with one a line."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]


def text(path):
    return path.read_text().strip() if path.exists() else ""


def main(folder):
    folder = pathlib.Path(folder)
    status = {}
    for step in STEPS:
        code = text(folder / f"{step}.status")
        status[step] = "not run" if code == "" else "passed" if code == "0" else f"failed ({code})"
    tests = [t for t in lines(folder / "tests.jsonl") if t.get("type") == "test" and t.get("event") != "started"]
    count = {event: sum(t["event"] == event for t in tests) for event in ("ok", "failed", "ignored")}
    bench = {b["name"]: b["median"] for b in lines(folder / "bench.jsonl") if b.get("type") == "bench"}
    peers = {p["name"]: p["median"] for p in lines(folder / "peers.jsonl")}
    results = {
        "version": text(pathlib.Path(__file__).parent / "VERSION"),
        "device": text(folder / "device.log"),
        "steps": status,
        "tests": {**count, "failures": [t["name"] for t in tests if t["event"] == "failed"]},
        "median_ns": {**bench, **peers},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    report = [f"# {results['device'] or 'GPU'}", "", f"Version {results['version']}.", "", "| step | result |", "|---|---|"]
    report += [f"| {step} | {result} |" for step, result in status.items()]
    report += ["", f"Tests: {count['ok']} passed, {count['failed']} failed, {count['ignored']} left out."]
    report += [f"- failed: {name}" for name in results["tests"]["failures"]]
    report += ["", "| timing | median, us |", "|---|---|"]
    report += [f"| {name} | {ns / 1000:.1f} |" for name, ns in sorted(results["median_ns"].items())]
    (folder / "results.md").write_text("\n".join(report) + "\n")
    print((folder / "results.md").read_text())
    # Nothing tested is no success.
    sys.exit(any(s.startswith("failed") for s in status.values()) or count["ok"] == 0)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(sys.argv[1])
