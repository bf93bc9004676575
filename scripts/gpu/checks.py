"""Whether the kernels are right: at SAM's sizes, in the tests, under the sanitizers."""

import collections
import concurrent.futures
import math
import os
import shutil
import tempfile
import time

from process import BROKEN, HANGS, LONGEST, event, events

TOOLS = ["memcheck", "racecheck", "initcheck", "synccheck"]
# Runs with the same bits, at least.
RUNS = 10


def warm(kit, until):
    """The families at small sizes: the driver compiles candle's kernels and keeps them for every process that follows."""
    smoke_at(kit, until, "warm", ["--small"])


def smoke(kit, until):
    """The families at SAM's sizes. One that is wrong is measured nowhere."""
    kit.wrong |= smoke_at(kit, until, "smoke", kit.sizes)


def smoke_at(kit, until, step, sizes):
    """{family: what is wrong with it}. A family that kills its process is left out of the next one, which goes on; so is
    one that hung before."""
    families = kit.run([kit.program("smoke"), "--list"], until).out.split()
    rows, wrong, kernels = [], {name: "hung before" for name in families if name in kit.hangs}, []
    left = [name for name in families if name not in wrong]
    if not families:
        kit.results.note(step, "failed", reason="the program lists no family")
        return {}
    while left:
        begun, shown, here, done = run_smoke(kit, until, step, sizes, left, rows)
        kernels = here or kernels
        for family in begun:
            if found := judge_all(shown[family], kernels, done):
                wrong[family] = found
        left = [family for family in left if family not in begun]
        if not begun or done.status in (None, 0, 1):
            break
        # The last one took its process along.
        if done.status in (HANGS, BROKEN):
            kit.hangs.add(begun[-1])
        portable = dict(CANDLE_SAM_LORA_TEST_KERNELS="portable")
        _, shown, _, alone = run_smoke(kit, until, step, sizes, begun[-1:], rows, **portable)
        found = judge_all(shown[begun[-1]], ["Portable"], alone)
        wrong[begun[-1]] += f"; the portable kernels alone: {found or 'right'}"
    for family in left:
        wrong[family] = f"not run: {done.reason()}"
    good = [family for family in families if family not in wrong]
    reason = f"{len(good)} of {len(families)} families are right, of the kernels {' and '.join(kernels)}"
    kit.results.note(step, "failed" if wrong else "passed", reason=reason, rows=rows, failures=wrong)
    return wrong


def run_smoke(kit, until, step, sizes, families, rows, **environment):
    """Families that begun, {family: its lines}, the kernels that the device has, how the process ended."""
    begun, shown, kernels = [], collections.defaultdict(list), []

    def on_line(line):
        if (found := event(line)) is None:
            return
        if "kernels_here" in found:
            kernels.extend(found["kernels_here"])
        elif "self_test" in found:
            rows.append(found)  # the library's word, kept beside ours
        elif found.get("begun") in families:
            begun.append(found["begun"])
        elif found.get("family") in families:
            shown[found["family"]].append(found)
            rows.append(found)
            kit.results.note(step, "running", rows=rows)

    command = [kit.program("smoke"), *sizes, *words("--only", families)]
    done = kit.run(command, until, on_line=on_line, **environment)
    return begun, shown, kernels, done


def judge_all(lines, kernels, done):
    """The faults of a family, by its lines; an empty text if there are none."""
    found = [problem for line in lines if (problem := judge(line))]
    missing = [name for name in kernels or ["Native"] if name not in [line.get("kernels") for line in lines]]
    if missing:
        found.append(f"nothing of the {', '.join(missing)} kernels: {done.reason()}")
    return "; ".join(found)


def judge(row):
    """The fault of a line of a family, by its numbers; none if it is right."""
    try:
        return judged(row)
    except (TypeError, AttributeError) as error:
        return f"not a line of the smoke test: {error}"


def judged(row):
    by = row.get("kernels")
    if "failed" in row:
        return f"{by}: {row['failed']}"
    outputs = row.get("outputs") or []
    if len(outputs) < 2:
        return f"{by}: {len(outputs)} results, expected a value and gradients"
    for output in outputs:
        error, bound = output.get("error"), output.get("bound")
        # JSON has no NaN: it is null.
        numbers = all(isinstance(number, (int, float)) and math.isfinite(number) for number in (error, bound))
        if not numbers or error > bound:
            return f"{by}: {output.get('name')}: error {error}, bound {bound}"
    if row.get("runs", 0) < RUNS or row.get("same_bits") != row["runs"]:
        return f"{by}: {row.get('same_bits')} of {row.get('runs')} runs with the same bits, expected all of {RUNS}"
    if row.get("same_bits_in_turn") is not True:
        return f"{by}: other bits where no kernel begins before the one before it has ended"
    return None if row.get("ok") is True else f"{by}: right by its numbers, but not ok"


def words(option, values):
    return [word for value in values for word in (option, value)]


# Outcomes of a test, beside libtest's own.
ALONE, NOT_RUN = "ok with the portable kernels alone", "not run"
# The tests by what they hold, in the order in which they are run.
OF_OPERATION = ("gradients", "values", "strides", "repeat", "streams")


def phase(name):
    kind, dtype = name.split()[0], name.split()[-1]
    if kind in ("gradients", "values"):
        return 1 if dtype == "f32" else 0
    return {"strides": 2, "streams": 2, "graph": 2, "graphed": 2, "repeat": 3}.get(kind, 4)


def family(name):
    """The kernels that a test is about: a test that takes the GPU down takes none of another family along."""
    kind, rest = name.split(" ", 1)
    if kind not in (*OF_OPERATION, "graph"):
        return kind
    rest = rest.removeprefix("forward ").removeprefix("backward ")
    operation = rest.split()[0]
    if operation != "attention":
        return operation
    return "attention global" if "window None" in rest else "attention in windows"


# The families of the smoke test whose kernels a family of tests runs.
IN_SMOKE = {
    "attention global": ["attention_global_64", "attention_global_80"],
    "attention in windows": ["attention_windows_64", "attention_windows_80"],
    "lora_linear": ["lin1_gelu", "lin2"],
    "lora_qkv": ["qkv_lora"],
    "dora_linear": ["dora_linear"],
    "layer_norm": ["layer_norm"],
    "dropout": ["dropout"],
    "multi-head": ["tokens_to_image", "image_to_tokens"],
}


def tests(kit, until):
    """Every test, those of a phase and family in a process of their own. After a hang the others of the family run with the
    portable kernels alone."""
    listed = kit.run([kit.program("gpu"), "--list"], until).out.splitlines()
    names = [line.removesuffix(": test") for line in listed if line.endswith(": test")]
    jobs = collections.defaultdict(list)
    for name in names:
        jobs[phase(name), family(name)].append(name)
    if not jobs:
        return kit.results.note("tests", "failed", reason="the program lists no test")
    portable = {name for name, families in IN_SMOKE.items() if not kit.hangs.isdisjoint(families)}
    ended, lies = {}, {}
    workers = max(1, min(8, (os.cpu_count() or 2) // 2))
    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        work = [pool.submit(job, kit, until, *key, jobs[key], portable) for key in sorted(jobs)]
        for future in concurrent.futures.as_completed(work):
            outcomes, lie = future.result()
            ended |= outcomes
            lies |= lie
            tell(kit, "running", ended, lies)
    missing = {name: ("lost", "its process says nothing of it") for name in names if name not in ended}
    ended = {name: (ended | missing)[name] for name in names}
    tell(kit, None, ended, lies)


def tell(kit, result, ended, lies):
    """Notes the tests so far; with no result, the result that they have."""
    names = lambda wanted: [name for name, (outcome, _) in ended.items() if outcome == wanted]
    count = collections.Counter(outcome for outcome, _ in ended.values())
    well = ("ok", "ignored", ALONE, NOT_RUN)
    failures = {name: f"{outcome}: {why}" for name, (outcome, why) in ended.items() if outcome not in well} | lies
    if result is None:
        result = "failed" if failures or not count["ok"] else "stopped" if count[NOT_RUN] else "passed"
    reason = ", ".join(f"{number} {outcome}" for outcome, number in sorted(count.items()))
    kit.results.note("tests", result, reason=reason, failures=failures, alone=names(ALONE), not_run=names(NOT_RUN))


def job(kit, until, phase, family, names, portable):
    """({name: (outcome, message)}, {process: how it contradicts itself}) of tests that share a process."""
    ended, lost, lies, left = {}, {}, {}, list(names)
    while left:
        if time.monotonic() >= until:
            ended |= {name: (NOT_RUN, "out of time") for name in left}
            break
        alone = family in portable
        done = run_tests(kit, until, left, alone)
        found, lie = outcomes(done, left)
        if lie:
            lies[f"{family}, phase {phase}"] = lie
        ended |= {
            name: (ALONE if alone and outcome == "ok" else outcome, message)
            for name, (outcome, message) in found.items()
        }
        left = [name for name in left if name not in found]
        begun = [e["name"] for e in events(done.out) if e.get("event") == "started" and e.get("name") in left]
        if done.status is None and time.monotonic() >= until:
            continue
        if not begun:
            ended |= {name: ("lost", f"not begun: {done.reason()}") for name in left}
            break
        # It took its process along: once more with the portable kernels, then never again.
        if alone or begun[-1] in lost:
            left.remove(begun[-1])
        lost.setdefault(begun[-1], done.reason())
        portable.add(family)
    for name, why in lost.items():
        ended[name] = ("lost", f"{why}; then: {' '.join(ended.get(name, ('lost again', '')))}")
    return ended, lies


def run_tests(kit, until, names, portable, before=(), limit=LONGEST, **environment):
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("".join(f"{name}\n" for name in names))
        file.flush()
        environment |= {"CANDLE_SAM_LORA_TEST_NAMES": file.name}
        if portable:
            environment["CANDLE_SAM_LORA_TEST_KERNELS"] = "portable"
        command = [*before, kit.program("gpu"), "--test", "--format", "json"]
        return kit.run(command, until, limit=limit, **environment)


def outcomes(done, names):
    """({name: (outcome, message)} of those tests that ended, how the process contradicts itself if it does)."""
    found, summary = {}, None
    for line in events(done.out):
        if line.get("type") == "test" and line.get("event") != "started" and line.get("name") in names:
            found[line["name"]] = (str(line.get("event")), str(line.get("stdout", "")).strip())
        elif line.get("type") == "suite" and line.get("event") != "started":
            summary = line
    count = collections.Counter(outcome for outcome, _ in found.values())
    lie = None
    if summary and (summary.get("passed"), summary.get("failed")) != (count["ok"], count["failed"]):
        lie = f"says {summary.get('passed')} passed, {summary.get('failed')} failed; showed {dict(count)}"
    elif done.status == 0 and (summary is None or count["failed"]):
        lie = f"ended well, but showed {dict(count)} and {'a' if summary else 'no'} summary"
    return found, lie


# Three cases that Hopper's kernels run: whole grids, windows, projections.
SMALL_CASES = ["gradients attention 1x3x64 window None", "gradients attention 1x16x20 window", "gradients lora_qkv 1793"]


def sanitizers(kit, until):
    """Gradients under the tools, side by side since they are slow. In the short plan three cases, Hopper's kernels alone."""
    program = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    if program is None:
        return kit.results.note("sanitizers", "skipped", reason="compute-sanitizer is not installed")
    listed = kit.run([kit.program("gpu"), "--list"], until).out.splitlines()
    names = [line.removesuffix(": test") for line in listed if line.startswith("gradients ")]
    command, tools = [program, "--error-exitcode", 99, "--print-limit", 20], TOOLS
    if kit.plan == "short":
        names = [name for case in SMALL_CASES for name in names if name.startswith(case) and name.endswith("bf16")]
        command, tools = [*command, "--kernel-regex", "kns=sm90"], TOOLS[:2]
    watchdog = {"CANDLE_SAM_LORA_WATCHDOG": str(2 * kit.watchdog)}
    with concurrent.futures.ThreadPoolExecutor(len(tools)) as pool:
        work = {
            tool: pool.submit(
                run_tests, kit, until, names, False, [*command, "--tool", tool], limit=4 * LONGEST, **watchdog
            )
            for tool in tools
        }
        for tool, future in work.items():
            sanitized(kit, tool, names, future.result())


def sanitized(kit, tool, names, done):
    found, _ = outcomes(done, names)
    count = collections.Counter(outcome for outcome, _ in found.values())
    findings = [line for line in (done.out + done.err).splitlines() if line.startswith("=========")]
    summary = next((line.strip("= ") for line in reversed(findings) if "SUMMARY" in line), None)
    ran = f"{count['ok']} of {len(names)} tests passed, {count['failed']} failed"
    if done.status is None:
        kit.results.note(tool, "stopped", reason=f"{done.stopped}; {ran}")
    elif not count["ok"] and summary is None:
        kit.results.note(tool, "skipped", reason=f"the tool does not work here: {done.reason()}")
    else:
        good = done.status == 0 and count["ok"] == len(names)
        details = {} if good else {"findings": findings[:60]}
        kit.results.note(tool, "passed" if good else "failed", reason=f"{summary}; {ran}", **details)
