"""docs/performance.md and its plots, from a results file: `python benches/report/document.py RESULTS.json`."""

import json
import sys
from pathlib import Path
from statistics import median

import comparisons
from comparisons import KEPT, SPED_UP
from rows import rows_of

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"ours": "#c0392b", "sdpa (kept)": "#2471a3", "sdpa (default)": "#85929e"}


def number(value):
    if value is None:
        return ""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


def table(rows):
    """Rows as a Markdown table."""
    header = ["case", "metric", "unit", "ours", "peer", "", "ratio", "spread", "bar", "holds"]
    lines = [header, ["---"] * len(header)]
    for r in rows:
        spread = " / ".join("" if s is None else f"{s:.0%}" for s in r["spread"].values())
        bar = "" if r["bar"] is None else ("<= " if r["metric"] == "lora overhead" else ">= ") + f"{r['bar']:g}"
        holds = {None: "", True: "yes", False: "**no**"}[r["holds"]]
        cells = [r["case"], r["metric"], r["unit"], number(r["ours"]), number(r["peer"]), r["peer_name"]]
        lines.append([*cells, number(r["ratio"]), spread, bar, holds])
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


# The ten numbers that the document opens with: their words, the case and the metric.
HEADLINE = [
    ("image encoder", "encoder_forward", "time"),
    ("image encoder in bf16", "encoder_forward dtype=bf16", "time"),
    ("image encoder in bf16, weights in int8", "encoder_forward dtype=bf16 quantize=int8", "time"),
    ("memory of the image encoder", "encoder_forward", "memory"),
    ("global attention layer", "global_layer_forward", "time"),
    ("LoRA training step of the encoder", "encoder_train_step", "time"),
    ("memory of that step", "encoder_train_step", "memory"),
    ("mask decoder, 64 prompts", "decoder_forward batch=64", "time"),
    ("one prompt on a stored embedding", "decoder_prompt", "time"),
    ("training step of the mask decoder, 16 prompts", "decoder_train batch=16", "time"),
]


def is_rival(row):
    """Whether the row's peer computes the same, and without this crate's doing."""
    name = row["peer_name"]
    return not name.startswith((SPED_UP, "candle ours")) and "without_bias" not in name


# Peers as people call them.
PEERS = {
    "eager": "PyTorch",
    "sdpa": "PyTorch, SDPA",
    "compiled": "PyTorch, torch.compile",
    "openvino": "OpenVINO",
    "onnxruntime": "ONNX Runtime",
}


def headline(rows):
    """A row for each of HEADLINE: ours as installed beside the fastest peer, or the one that needs the least memory.

    No row where that peer's is withheld: the next one would flatter us.
    """
    lines = ["| | ours | the best peer | | times |", "| --- | --- | --- | --- | --- |"]
    for words, case, metric in HEADLINE:
        rivals = [row for row in rows if (row["case"], row["metric"]) == (case, metric) and is_rival(row)]
        row = min(rivals, key=lambda row: row["peer"], default=None)
        if row and row["withheld"] is None:
            unit, peer = row["unit"], row["peer_name"]
            peer = PEERS.get(peer.split()[1], peer) if peer.startswith("pytorch ") else peer
            cells = [words, f"{number(row['ours'])} {unit}", f"{number(row['peer'])} {unit}", peer]
            lines.append("| " + " | ".join([*cells, number(row["ratio"])]) + " |")
    return "\n".join(lines) + "\n" if len(lines) > 2 else ""


def points(results, config, options, value):
    """[(x, value)] of the runs of one configuration; `options(config)` gives x, or none where a run is not meant."""
    found = {}
    for run in results["runs"]:
        x = options(run["comparison"], run["measured"]["config"])
        if run["config"] == config and x is not None:
            y = value(run["measured"])
            if y is not None:
                found.setdefault(x, []).append(y)
    return sorted((x, median(ys)) for x, ys in found.items())


def time_of(measured):
    return median(measured["wall_s"] or [measured["first_s"]])


def memory_of(measured):
    return measured["memory"] / 2**20 if measured.get("memory") else None


def of_layer(name, x):
    """x of the global layer's runs that differ in nothing but it."""

    def options(comparison, config):
        fixed = config["dtype"] == "f32" and (config["batch"] == 1 if x == "grid" else config["grid"] == 32)
        return config[x] if comparison.split()[0] == name and fixed else None

    return options


def plot(path, title, x_label, y_label, lines, log=True):
    """False where there are no two points to connect."""
    lines = [(label, xy) for label, xy in lines if len(xy) > 1]
    if not lines:
        return False
    import matplotlib  # not needed for tables alone

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "candle-sam-lora"  # the same file from the same numbers
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 4), layout="constrained")
    for label, xy in lines:
        colour = COLOURS.get(label.removeprefix("PyTorch "))
        axes.plot(*zip(*xy), marker="o", label=label, color=colour)
    if log:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
    ticks = sorted({x for _, xy in lines for x, _ in xy})
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.grid(alpha=0.3)
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return True


def plots(results, folder):
    """[(file, caption)]"""
    ours, kept, default = "candle ours (default)", "pytorch sdpa (kept)", "pytorch sdpa (default)"
    layer = "global_layer_forward"
    made = []

    def curves(x, value, configs):
        return [(label, points(results, config, of_layer(layer, x), value)) for label, config in configs]

    fast = [("ours", ours), ("PyTorch sdpa (kept)", kept), ("PyTorch sdpa (default)", default)]
    name, caption = "time-grid.svg", "Time of the global attention layer, forward, against the side of the grid"
    if plot(folder / name, caption, "tokens a side", "s", curves("grid", time_of, fast)):
        made.append((name, caption))
    name, caption = "time-batch.svg", "Time of the global attention layer on a 32 x 32 grid against the batch"
    if plot(folder / name, caption, "images", "s", curves("batch", time_of, fast[:2])):
        made.append((name, caption))
    name, caption = "memory-tokens.svg", "Memory of the global attention layer, forward, against the tokens N"
    squared = [(label, [(x * x, y) for x, y in xy]) for label, xy in curves("grid", memory_of, [fast[0], fast[2]])]
    if plot(folder / name, caption, "N", "MiB, growth of the peak", squared):
        made.append((name, caption))

    def overhead(measured):
        return median(a / f for a, f in zip(measured["wall_s"], measured["base_wall_s"]))

    def rank_of(case):
        return lambda comparison, config: config["rank"] if comparison.split()[0] == case else None

    labels = [("q, k, v projections alone", "qkv_lora"), ("windowed layer", "windowed_layer_lora")]
    lines = [(label, points(results, ours, rank_of(case), overhead)) for label, case in labels]
    name, caption = "lora-rank.svg", "Forward with LoRA on q and v over the frozen forward, against the rank"
    if plot(folder / name, caption, "rank", "ratio", lines, log=False):
        made.append((name, caption))
    return made


INTRODUCTION = """# Performance{where}

After this page you know how fast the crate is beside what else one would use, and how that was measured.

{headline}
Batch 1, 1024 x 1024, f32 unless said, ours under the default allocator. *times* is peer / ours.

## How it was measured

Written by `benches/report` from `{source}`; do not edit. Made by

    {command}

on {date} at {commits}, in {seconds} s.

{machine}

{versions}

Every measurement is a process of its own. Times are medians of the runs after the first; spread is the interquartile
range over the median, ours / peer. Training cases: LoRA of rank 16 on q and v with dropout 0.1; the step of the encoder
includes AdamW, on both sides. *composed* is this crate's modules written with candle's own operations.
*sdpa_without_bias* has no relative positions: it computes something else, and bounds what SDPA could do. The ratio is
peer / ours for time and memory, adapted / frozen for the LoRA overhead.
"""

ON_THE_CPU = """*kept* is glibc told to keep freed pages (`MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=67108864`). On many machines mapping and unmapping an N x N tensor
costs as much as computing it. Programs that have such tensors gain by keeping pages, at the price of memory. Memory is the
growth of the peak of the resident memory over what was resident before the first run. A case alone is our process under
the default allocator, `/kept` after it our process under the keeping one. So `/kept` against *(kept)*, and a case alone
against *(default)*, are like against like. A case alone against *(kept)* is us as we are installed against the peer at
its best. The bars on time are against the fastest peer with the keeping allocator, those on memory against the default one.

*candle as published* is a program that does not have this crate. *candle with this crate's AVX-512* is candle beside
it: the feature of `gemm` that this crate asks for reaches candle's own products, too. The bars are for the first; the
second, which is faster by this crate's doing, stands among them with its ratio and no bar.

For GFLOP/s and GB/s the ratio is the share of the machine's best. The work behind them is what the formulas need;
recomputation is not counted.
"""

ON_A_GPU = """Memory is the growth of the peak that the allocator counts for tensors: of the driver's pool, or of PyTorch's. Before
each run of PyTorch's the cache is emptied; ours take one input of many in turn. The operations of an implementation are
launched one by one, and the clock stops when the last has ended. *flex* is FlexAttention, compiled; *triton* a kernel in
the manner of the published ones; in the encoder, both in the global layers alone.
"""


def is_stricter(row, rows):
    """Whether the row is that of the keeping candle sped up by this crate, in a case that has a bar on time."""
    if not row["peer_name"].startswith(SPED_UP) or not row["peer_name"].endswith(f"({KEPT})") or row["metric"] != "time":
        return False
    return any(other["bar"] is not None and other["metric"] == "time" and other["case"] == row["case"] for other in rows)


def commits(results):
    """The commits that were measured, the last first."""
    head = results["head"]["commit"]
    measured = dict.fromkeys([head, *(run.get("commit", head) for run in results["runs"])])
    return ("commit " if len(measured) == 1 else "commits ") + ", ".join(f"`{commit}`" for commit in measured)


def write(results, source, path):
    """The document at `path`, its plots in a folder beside it of the same name."""
    head = results["head"]
    facts = lambda group: ", ".join(f"{key} {value}" for key, value in group.items())
    folder = path.with_suffix("")
    source = Path(source).resolve()
    relative = source.relative_to(ROOT) if source.is_relative_to(ROOT) else source.name
    gpu = head["machine"].get("gpu")
    rows = rows_of(results["runs"], comparisons.GPU if gpu else comparisons.CPU)
    published = [row for row in rows if row["withheld"] is None]
    parts = [
        INTRODUCTION.format(
            where=" on a GPU" if gpu else "",
            source=relative,
            command=head["command"],
            date=head["date"],
            headline=headline(rows),
            commits=commits(results),
            seconds=head["seconds"],
            machine="Machine: `" + facts(head["machine"]) + "`.",
            versions="Versions: `" + facts(head["versions"]) + "`.",
        ),
        ON_A_GPU if gpu else ON_THE_CPU,
    ]
    if hidden := [row for row in rows if row not in published]:
        reasons = sorted({row["withheld"] for row in hidden})
        parts.append(f"{len(hidden)} rows are not shown ({'; '.join(reasons)}); the results have them, marked.\n")
    if barred := [row for row in published if row["bar"] is not None or is_stricter(row, published)]:
        parts.append("## Bars\n\n" + table(barred) + "\n")
    for name, caption in plots(results, folder):
        parts.append(f"![{caption}]({folder.name}/{name})\n")
    if gpu:
        parts.append("## Everything measured\n\n" + table(published) + "\n")
    else:
        parts.append(f"All {len(rows)} rows and every run stand in `{relative}`.\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    write(json.loads(Path(sys.argv[1]).read_text()), sys.argv[1], ROOT / "docs/performance.md")
