"""The predictions of docs/gpu-notes.md beside the measurements.

A measurement outside its range, on either side, says that the model of the kernel is wrong. A kernel that is faster than
its bound does not do all of its work.
"""

from typing import NamedTuple


class Prediction(NamedTuple):
    """Microseconds of a measurement of `headline`, by the kernels for the GPU's own architecture."""

    name: str
    low: float
    high: float
    where: str


# On an H200 in bf16.
PREDICTIONS = [
    Prediction("attention_global_64 forward batch 1 grid 64", 95, 140, "the attention's forward"),
    Prediction("attention_global_64 backward batch 1 grid 64", 260, 400, "the attention's backward"),
    Prediction("attention_windows_64 forward batch 8 grid 64", 8 * 12, 8 * 16, "in windows: 12 to 16 an image"),
    Prediction("attention_windows_64 backward batch 8 grid 64", 8 * 35, 8 * 50, "in windows: 35 to 50 an image"),
    Prediction("qkv_lora forward batch 4 grid 64", 94, 115, "the projections: 84 to 100, and 10 to 15 for S"),
]
HEADER = ["", "expected us", "measured us", "", "from"]
FIT_HEADER = ["", "tables", "by", "us at N = 0", "TFLOP/s of the slope"]


def chosen(row):
    """Whether a row is of what runs when nobody asks for a tile."""
    return "us" in row and row["tile"] is None


def compared(rows):
    found = {row["name"]: row["us"] for row in rows if chosen(row) and row["kernels"] == "Native"}
    table = []
    for name, low, high, where in PREDICTIONS:
        us = found.get(name)
        if us is None:
            verdict = "not measured"
        elif low <= us <= high:
            verdict = "as expected"
        else:
            verdict = f"{us / high:.2f} times the most" if us > high else f"{us / low:.2f} times the least"
        table.append([name, f"{low:g} to {high:g}", "" if us is None else f"{us:.1f}", verdict, where])
    return table


def line(points):
    """Least squares: (intercept, slope)."""
    count, mean_x = len(points), sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / count
    square = sum((x - mean_x) ** 2 for x, _ in points)
    slope = sum((x - mean_x) * (y - mean_y) for x, y in points) / square
    return mean_y - slope * mean_x, slope


def fits(rows):
    """The attention's time against the square of its tokens: the intercept is launches and prologues, the slope the loop."""
    groups = {}
    for row in rows:
        if chosen(row) and row["family"].startswith("attention_global") and row["batch"] == 1:
            key = (f"{row['family']} {row['name'].split()[1]}", row["tables"], row["kernels"])
            flop = row["us"] * row["tflops"]  # in millions
            groups.setdefault(key, []).append((row["grid"] ** 4, row["us"], flop))
    table = []
    for (name, tables, kernels), points in groups.items():
        if len({x for x, *_ in points}) < 3:
            continue
        intercept, slope = line([(x, us) for x, us, _ in points])
        flop = sum(flop for *_, flop in points) / sum(x for x, *_ in points)
        rate = f"{flop / slope:.0f}" if slope > 0 else ""
        table.append([name, "yes" if tables else "no", kernels, f"{intercept:.1f}", rate])
    return table
