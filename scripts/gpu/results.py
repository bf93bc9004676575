"""The files of a visit: results.json and results.md, whole at every moment, and log.txt."""

import contextlib
import datetime
import json
import os

import predictions

# Every file that a visit may write, its steps' own included.
WRITTEN = ["results.json", "results.md", "log.txt", "bench.json", "performance.md"]
WRITTEN += ["measured.rs", "tiles.json", "profile.txt"]
MOST_LOGGED = 12 << 20


class Results:
    """The results so far. A disk that is full ends no step: the last report goes to stdout in any case."""

    def __init__(self, folder, version, build, plan):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        for name in WRITTEN:
            (folder / name).unlink(missing_ok=True)
        self.logged, self.unwritten = 0, {}
        date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
        self.all = {"version": version, "build": build, "plan": plan, "date": date, "device": "", "steps": {}}

    def note(self, step, result, **details):
        """Notes how a step went, and writes everything so far. `result` is passed, failed, skipped, stopped, not run, or
        running."""
        self.all["steps"][step] = {"result": result, **details}
        self.write()
        if result != "running":
            reason = details.get("reason")
            print(f"{step}: {result}" + (f" ({reason})" if reason else ""), flush=True)

    def write(self):
        """Each file is written beside its old version and then takes its place."""
        for name, text in [("results.json", json.dumps(self.all, indent=1) + "\n"), ("results.md", report(self.all))]:
            part = self.folder / f"{name}.part"
            try:
                part.write_text(text)
                os.replace(part, self.folder / name)
                self.unwritten.pop(name, None)
            except OSError as error:
                self.unwritten[name] = error.strerror
                part.unlink(missing_ok=True)

    def log(self, text):
        if self.logged + len(text) > MOST_LOGGED:
            text = "(the log is full)\n" if self.logged < MOST_LOGGED else ""
            self.logged = MOST_LOGGED
        self.logged += len(text)
        try:
            with open(self.folder / "log.txt", "a") as log:
                log.write(text)
        except OSError as error:
            self.unwritten["log.txt"] = error.strerror

    def failed(self):
        return bool(self.unwritten) or any(step["result"] == "failed" for step in self.all["steps"].values())


def table(header, rows):
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in [header, ["---"] * len(header), *rows]]
    return ["", *lines]


def report(results):
    """The results as Markdown."""
    steps = results["steps"]
    lines = [f"# {results['device'] or 'GPU'}", "", f"Version {results['version']}, {results['date']}."]
    lines += ["", results["build"]]
    lines += table(
        ["step", "result", ""], [[name, step["result"], step.get("reason", "")] for name, step in steps.items()]
    )
    for name, step in steps.items():
        if found := step.get("failures"):
            lines += ["", f"## {name}: failures", ""] + [f"- {what}: {message}" for what, message in found.items()]
        if findings := step.get("findings"):
            lines += ["", f"## {name}: findings", "", "```", *findings, "```"]
    if rows := steps.get("smoke", {}).get("rows"):
        lines += ["", "## Families at SAM's sizes"] + table(["", "kernels", "largest error / bound", "seconds"], families(rows))
        for said in [row for row in rows if "self_test" in row][-1:]:
            lines += ["", "## The library's self-test"] + table(["family", "dtype", "kernels", "", "worst"], self_test(said))
    ours = steps.get("headline", {}).get("rows", [])
    if ours:
        lines += headline(ours, steps.get("peers", {}).get("rows", []))
        lines += ["", "## Predictions"] + table(predictions.HEADER, predictions.compared(ours))
        lines += ["", "## Time against tokens"] + table(predictions.FIT_HEADER, predictions.fits(ours))
    if rows := steps.get("bench", {}).get("rows"):
        keys = ("case", "metric", "ours", "peer", "peer_name", "ratio")
        lines += ["", "## Benchmarks"]
        lines += table(keys, [["" if row[key] is None else row[key] for key in keys] for row in rows])
    return "\n".join(lines) + "\n"


def families(rows):
    for row in rows:
        with contextlib.suppress(TypeError, KeyError, ValueError, ZeroDivisionError):
            worst = max(output["error"] / output["bound"] for output in row["outputs"])
            yield row["family"], row["kernels"], f"{worst:.2f}", f"{row['seconds']:.1f}"


def self_test(said):
    for row in said["self_test"]:
        verdict = "ok" if row["ok"] else "refused"
        yield row["family"], row["dtype"], row["kernels"], verdict, row["failure"] or row["worst"]


def headline(ours, peers):
    """Ours and PyTorch's times side by side."""
    rows = []
    for row in [*ours, *peers]:
        by = row.get("tile") or row.get("kernels") or f"PyTorch {row['implementation']}"
        if "us" in row:
            spread = (row["most_us"] - row["least_us"]) / row["us"]
            numbers = [f"{row['us']:.1f}", f"{spread:.0%}", f"{row['tflops']:.0f}", row.get("sm_mhz", "")]
        else:
            numbers = [row.get("failed", "failed"), "", "", ""]
        rows.append([row["name"], by, *numbers])
    names = list(dict.fromkeys(row["name"] for row in ours))
    rows.sort(key=lambda row: names.index(row[0]) if row[0] in names else len(names))
    return ["", "## Times"] + table(["", "by", "us", "spread", "TFLOP/s", "SM MHz"], rows)
