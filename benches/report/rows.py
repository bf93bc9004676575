"""From runs to rows `{case, metric, unit, ours, peer, peer_name, ratio, spread, bar, holds}`.

| metric | ratio | of what; bar |
|---|---|---|
| time | peer / ours | the medians; bar: at least, against the fastest kept peer |
| memory | peer / ours | bar: at least, against the named peer with the default allocator |
| resident | peer / ours | weights and all; bar: at least, against the named peer |
| peak | peer / ours | a training step's on a GPU, weights and all; no bar |
| rate | none | a GPU's arithmetic, counted on the operation's products |
| lora | adapted / frozen | median of the ratios of neighbouring runs; bar: at most |
| time, memory | our f32 / our bf16 | bar: at least |
| time, memory | ours without / with | the step with gradient checkpointing; no bar |
| limit | ours / the machine's best | GFLOP/s over the GEMM's, GB/s over the copy's; no bar |

`spread` is (q75 - q25) / median of each side's runs; of a side with less than three runs, (max - min) / median. A row of times is
`withheld`, and stands in the results alone, if a side was disturbed by other processes or spreads too widely.
A case measured with our process under the keeping allocator has "/kept" after its name; its bars are the same.
"""

from statistics import median, quantiles

import comparisons
from comparisons import DEFAULT, KEPT, SPED_UP, Config

MIB = 2**20
# Other processes' share of the CPUs, and the spread of a side, that a published row has at most.
MOST_LOAD, MOST_SPREAD = 0.06, 0.10


class Samples:
    """All runs of one configuration of one comparison."""

    def __init__(self, runs):
        measured = [run["measured"] for run in runs]
        self.wall = [s for m in measured for s in (m["wall_s"] or [m["first_s"]])]
        self.base = [s for m in measured for s in m.get("base_wall_s", [])]
        self.memory = [m["memory"] / MIB for m in measured if m.get("memory") is not None]
        self.resident = [m["resident"] / MIB for m in measured if m.get("resident") is not None]
        self.gpu_peak = [m["gpu_peak"] / MIB for m in measured if m.get("gpu_peak") is not None]
        self.flops, self.bytes = measured[0].get("flops"), measured[0].get("bytes")
        self.time = median(self.wall)
        self.is_disturbed = any((run["others"] or 0) > MOST_LOAD for run in runs)

    def of(self, metric):
        """The values whose spread tells how sure the metric is."""
        return {"memory": self.memory, "resident": self.resident, "peak": self.gpu_peak}.get(metric, self.wall)


def spread(values):
    if len(values) < 2 or median(values) == 0:
        return None
    if len(values) < 3:
        return round((max(values) - min(values)) / median(values), 3)
    low, _, high = quantiles(values, n=4, method="inclusive")
    return round((high - low) / median(values), 3)


def withheld(metric, sides):
    """Why a row is not to be published, if so. Others take time, not memory."""
    if metric in ("memory", "resident", "peak"):
        return None
    if any(side.is_disturbed for side in sides):
        return f"other processes took more than {MOST_LOAD:.0%}"
    if any((spread(side.wall) or 0) > MOST_SPREAD for side in sides):
        return f"spread above {MOST_SPREAD:.0%}"
    return None


def row(case, metric, unit, numbers, sides, peer_name, ratio, bar=None, holds=None):
    """`numbers` and `sides` are ours and the peer's; a number may have no peer."""
    number = lambda value: None if value is None else float(f"{value:.4g}")
    ours, peer = numbers
    return {
        "case": case,
        "metric": metric,
        "unit": unit,
        "ours": number(ours),
        "peer": number(peer),
        "peer_name": peer_name,
        "ratio": number(ratio),
        "spread": dict(zip(("ours", "peer"), [*(spread(side.of(metric)) for side in sides), None])),
        "bar": bar,
        "holds": holds,
        "withheld": withheld(metric, sides),
    }


def rows_of(runs, compared):
    samples = {}
    for run in runs:
        samples.setdefault((run["comparison"], run["config"]), []).append(run)
    samples = {key: Samples(group) for key, group in samples.items()}
    rows = []
    for comparison in compared:
        of_case = {config: s for (name, config), s in samples.items() if name == comparison.name}
        if not of_case:
            continue
        if comparison.case.endswith("_lora"):
            rows += lora_rows(comparison, of_case)
            continue
        for allocator in (DEFAULT, KEPT):
            ours = of_case.get(Config("candle", "ours", allocator).name)
            if ours is not None:
                suffix = "/kept" if allocator == KEPT else ""
                rows += time_rows(comparison, suffix, ours, of_case)
                rows += memory_rows(comparison, suffix, ours, of_case) if allocator == DEFAULT else []
                rows += resident_rows(comparison, ours, of_case) if allocator == DEFAULT else []
                if comparison is comparisons.CHECKPOINTED:
                    rows += checkpointed_rows(comparison, ours, samples)
                rows += rate_rows(comparison, ours)
                rows += peak_rows(comparison, ours, of_case) if comparison.case.endswith("train_step") else []
                rows += limit_rows(comparison, suffix, ours, samples)
                if comparison in comparisons.BF16:
                    rows += bf16_rows(comparison, suffix, ours, samples, allocator)
    return rows


def others(of_case):
    return {name: s for name, s in of_case.items() if not name.startswith("candle ours")}


def time_rows(comparison, suffix, ours, of_case):
    peers = others(of_case)
    best = [n for n in peers if n.endswith(f"({KEPT})") and "without_bias" not in n and not n.startswith(SPED_UP)]
    best = min(best, key=lambda name: peers[name].time, default=None)
    for name, peer in peers.items():
        ratio = peer.time / ours.time
        bar = comparison.time_bar if name == best else None
        holds = None if bar is None else ratio >= bar
        times = (ours.time, peer.time)
        yield row(comparison.name + suffix, "time", "s", times, (ours, peer), name, ratio, bar, holds)


def memory_rows(comparison, suffix, ours, of_case):
    bar, barred = comparison.memory_bar or (None, None)
    for name, peer in others(of_case).items():
        if not (ours.memory and peer.memory and name.endswith(f"({DEFAULT})")):
            continue
        mine, theirs = max(ours.memory), max(peer.memory)
        asked = bar if barred is not None and name == barred.name else None
        ratio = theirs / max(mine, 1e-3)
        holds = None if asked is None else ratio >= asked
        yield row(comparison.name + suffix, "memory", "MiB", (mine, theirs), (ours, peer), name, ratio, asked, holds)


def resident_rows(comparison, ours, of_case):
    bar, barred = comparison.resident_bar or (None, None)
    peer = barred and of_case.get(barred.name)
    if peer and peer.resident and ours.resident:
        mine, theirs = max(ours.resident), max(peer.resident)
        ratio, name = theirs / mine, barred.name
        yield row(comparison.name, "resident", "MiB", (mine, theirs), (ours, peer), name, ratio, bar, ratio >= bar)


def peak_rows(comparison, ours, of_case):
    for name, peer in others(of_case).items():
        if ours.gpu_peak and peer.gpu_peak:
            mine, theirs = max(ours.gpu_peak), max(peer.gpu_peak)
            yield row(comparison.name, "peak", "MiB", (mine, theirs), (ours, peer), name, theirs / mine)


def rate_rows(comparison, ours):
    if ours.gpu_peak and ours.flops:
        rate = ours.flops / ours.time / 1e12
        yield row(comparison.name, "rate", "TFLOP/s", (rate, None), (ours,), "", None)


def limit_rows(comparison, suffix, ours, samples):
    best = lambda probe: samples.get((probe, "candle ours (default)"))
    gemm, copy = best("gemm_peak"), best("copy_bandwidth")
    if comparison in comparisons.PROBES:
        return
    for metric, unit, work, probe in (("flops", "GFLOP/s", "flops", gemm), ("bandwidth", "GB/s", "bytes", copy)):
        if probe is not None and getattr(ours, work):
            rate = getattr(ours, work) / ours.time / 1e9
            peak = getattr(probe, work) / min(probe.wall) / 1e9
            case, name = comparison.name + suffix, "the machine's best"
            yield row(case, metric, unit, (rate, peak), (ours, probe), name, rate / peak)


def bf16_rows(comparison, suffix, ours, samples, allocator):
    exact = comparison.name.removesuffix(" dtype=bf16")
    f32 = samples.get((exact, Config("candle", "ours", allocator).name))
    if f32 is None:
        return
    case, name, sides = comparison.name + suffix, f"candle ours f32 ({allocator})", (ours, f32)
    ratio, bar = f32.time / ours.time, comparisons.BF16_BARS[exact]
    yield row(case, "time", "s", (ours.time, f32.time), sides, name, ratio, bar, ratio >= bar)
    bar = comparisons.BF16_MEMORY_BARS.get(exact)
    if bar and allocator == DEFAULT and ours.memory and f32.memory:
        mine, theirs = max(ours.memory), max(f32.memory)
        ratio = theirs / mine
        yield row(case, "memory", "MiB", (mine, theirs), sides, name, ratio, bar, ratio >= bar)


def checkpointed_rows(comparison, ours, samples):
    name = Config("candle", "ours").name
    plain = samples.get(("encoder_train_step", name))
    if plain is None:
        return
    peer, sides = "candle ours, not checkpointed", (ours, plain)
    yield row(comparison.name, "time", "s", (ours.time, plain.time), sides, peer, plain.time / ours.time)
    if ours.memory and plain.memory:
        mine, theirs = max(ours.memory), max(plain.memory)
        yield row(comparison.name, "memory", "MiB", (mine, theirs), sides, peer, theirs / mine)


def lora_rows(comparison, of_case):
    for adapted in of_case.values():
        ratio = median(a / f for a, f in zip(adapted.wall, adapted.base))
        # The bar is on the layers; the projections alone are shown for what they are, other ranks for the plot.
        barred = comparison.case != "qkv_lora" and not comparison.options
        bar = comparisons.LORA_BAR if barred else None
        holds = None if bar is None else ratio <= bar
        times, name = (adapted.time, median(adapted.base)), "candle ours, frozen"
        yield row(comparison.name, "lora overhead", "s", times, (adapted,), name, ratio, bar, holds)
