#!/usr/bin/env python3
"""How the time of a training step grows with the number of processes: a model, fitted to measurements, and its predictions.

    step     = parts x (slowest of N computations)  +  exchange  +  update
    slowest  = compute x (1 + spread x e(N))        e(N): expected largest of N standard normal numbers
    exchange = messages x (latency + (N - 1) x peer)  +  trips x wire  +  bytes sent / bandwidth  +  bytes received / memory

With A parts a rank and S bytes of gradients:

    N S <= 128 KiB:  A messages, A (N - 1) S sent, A N S received.
    N S > 128 KiB:  2 A + 1 messages, (A + 1) (N - 1) / N S sent, (A + 1) S received.

A message makes two trips over the wire, lengths and bytes. A chunk of more than 64 KiB makes two more: MPI asks first.

The fit takes latency and peer from exchanges of at most 1 KiB. Memory is the work of copying and adding, from steps of
two without delays. Steps with delays, which it has not seen, then test it. `benches/distributed.rs` makes both files, and
under `scripts/mpi_two_hosts.py` the rows of a third, of steps over a cable with a delay.

usage: scale_model.py EXCHANGE.csv STEP.csv [CABLE.csv] [--compute SECONDS ..] [--spread FRACTION]
"""

import argparse
import csv
import random
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import NormalDist, fmean

FRESH = 32 << 20  # glibc's largest M_MMAP_THRESHOLD
SMALL = 128 << 10  # as in src/train/distributed/ordered_sum.rs
EAGER = 64 << 10  # bytes that OpenMPI sends over TCP without asking: btl_tcp_eager_limit
LORA, DECODER, ALL = 589_824, 4_058_340, 93_735_472  # parameters of ViT-B; see docs/parameter-counts.md
PAYLOADS = {"LoRA": 4 * LORA, "LoRA, `modules_to_save`": 4 * (LORA + DECODER), "all parameters": 4 * ALL}
RANKS = (8, 64, 1024)


@dataclass(frozen=True)
class Network:
    """Costs of an exchange."""

    latency: float  # seconds of an exchange of nothing between two
    peer: float  # seconds for each other rank
    bandwidth: float  # bytes a second that a process sends while it receives as many
    memory: float  # bytes of gradients that a process copies and adds a second, those that it received
    fresh: float = float("inf")  # the same of gradients for which malloc maps fresh pages each time
    wire: float = 0.0  # seconds of a trip from one process to another

    def exchange(self, ranks, size, parts=1, small=None):
        """Seconds of a step's exchanges of `size` bytes of gradients, with `parts` for each rank."""
        memory = self.fresh if size > FRESH else self.memory
        costs = self.latency, self.peer, 1 / self.bandwidth, 1 / memory
        seconds = sum(count * cost for count, cost in zip(coefficients(ranks, size, parts, small), costs))
        return seconds + trips(ranks, size, parts) * self.wire


# Latency as TCP has it on Ethernet and as InfiniBand has it; 94 % of the wire's bytes carry data.
NETWORKS = {"1 GbE": (100e-6, 0.94e9 / 8), "10 GbE": (50e-6, 9.4e9 / 8), "100 Gb": (5e-6, 94e9 / 8)}


def coefficients(ranks, size, parts=1, small=None):
    """Exchanges, messages to peers, bytes sent and bytes received of a step."""
    if ranks == 1:
        return 0, 0, 0, 0
    if ranks * size <= SMALL if small is None else small:
        messages, sent, received = parts, parts * (ranks - 1) * size, parts * ranks * size
    else:
        messages, sent, received = 2 * parts + 1, (parts + 1) * (ranks - 1) / ranks * size, (parts + 1) * size
    return messages, messages * (ranks - 1), sent, received


def trips(ranks, size, parts=1):
    """One after another, of a step."""
    messages, *_ = coefficients(ranks, size, parts)
    asked = parts + 1 if ranks * size > SMALL and size / ranks > EAGER else 0
    return 2 * messages + 2 * asked


def largest_normal(ranks):
    """Expected largest of `ranks` standard normal numbers: Blom's approximation, 4 % off for two and less for more."""
    return NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25)) if ranks > 1 else 0.0


def step_time(network, ranks, size, compute, spread=0.0, parts=1, update=0.0):
    """Seconds of a step."""
    slowest = compute * (1 + spread * largest_normal(ranks))
    return parts * slowest + network.exchange(ranks, size, parts) + update


def simulated_step_time(network, ranks, size, compute, spread=0.0, parts=1, update=0.0, steps=400, seed=0):
    """The same by drawing each part's time: the mean step."""
    draw = random.Random(seed).gauss
    part = lambda: max(max(draw(compute, compute * spread), 0.0) for _ in range(ranks))
    slowest = fmean(sum(part() for _ in range(parts)) for _ in range(steps))
    return slowest + network.exchange(ranks, size, parts) + update


def efficiency(network, ranks, size, compute, spread=0.0):
    """Samples a second of each rank over those of one rank by itself."""
    return compute / step_time(network, ranks, size, compute, spread)


def fit(rows):
    """Latency and peer by least squares of the relative errors of exchanges that carry next to nothing."""
    a, y = [], []
    for row in rows:
        for column, small in (("whole_s", True), ("chunks_s", False)):
            if int(row["bytes"]) <= 1024:
                counts = coefficients(int(row["ranks"]), 4, small=small)
                a.append([count / float(row[column]) for count in counts[:2]])
                y.append(1.0)
    latency, peer = nonnegative(a, y)
    return Network(latency, peer, float("inf"), float("inf"))


def nonnegative(a, y):
    """The two numbers of least |a x - y| that are not below zero."""
    dot = lambda u, v: sum(p * q for p, q in zip(u, v))
    first, second = zip(*a)
    alone = [(dot(first, y) / dot(first, first), 0.0), (0.0, dot(second, y) / dot(second, second))]
    determinant = dot(first, first) * dot(second, second) - dot(first, second) ** 2
    if determinant > 1e-9 * dot(first, first) * dot(second, second):
        x = dot(second, second) * dot(first, y) - dot(first, second) * dot(second, y)
        z = dot(first, first) * dot(second, y) - dot(first, second) * dot(first, y)
        if x >= 0 and z >= 0:
            return x / determinant, z / determinant
    error = lambda x: sum((p * x[0] + q * x[1] - t) ** 2 for (p, q), t in zip(a, y))
    return min(alone, key=error)


def with_memory(network, rows):
    """The network, and what bytes received cost: the rest of the time of exchanges in steps of two without a delay."""
    rest, received = [0.0, 0.0], [0.0, 0.0]
    for row in rows:
        size, parts = int(row["bytes"]), int(row["parts"]) // 2
        undelayed = row["latency_us"] == "0" and row["gbit"] == "inf" and row["spread"] == "0"
        if row["ranks"] == "2" and undelayed and 2 * size > SMALL:
            rest[size > FRESH] += float(row["exchange_s"]) - network.exchange(2, size, parts)
            received[size > FRESH] += coefficients(2, size, parts)[3]
    memory, fresh = (count / time if time > 0 else float("inf") for count, time in zip(received, rest))
    return replace(network, memory=memory, fresh=fresh)


def predicted(network, row):
    """Seconds of the step of a row of STEP.csv, from what the row injected and what one process alone computes."""
    ranks, size, parts = int(row["ranks"]), int(row["bytes"]), int(row["parts"]) // int(row["ranks"])
    injected = Network(float(row["latency_us"]) * 1e-6, 0.0, float(row["gbit"]) * 1e9 / 8, float("inf"))
    extra = injected.exchange(ranks, size, parts)
    compute, spread = float(row["base_s"]), float(row["spread"]) * float(row["compute_ms"]) / 1e3 / float(row["base_s"])
    return step_time(network, ranks, size, compute, spread, parts, float(row["update_s"])) + extra


def with_base(rows):
    """Steps of several ranks, each with the compute of a part of the single process of the same settings."""
    key = lambda row: (row["model"], row["bytes"], row["compute_ms"])
    alone = {key(row): row for row in rows if row["ranks"] == "1"}
    base = lambda row: {"base_s": float(row["compute_s"]) / int(row["parts"])}
    return [row | base(alone[key(row)]) for row in rows if row["ranks"] != "1"]


def over_a_cable(rows):
    """Rows with the predicted and the measured seconds of a step; the cable's own work is in the steps without delay and loss."""
    start = {row["bytes"]: float(row["step_s"]) for row in rows if float(row["delay_ms"]) == float(row["loss"]) == 0}
    for row in rows:
        extra = trips(int(row["ranks"]), int(row["bytes"])) * float(row["delay_ms"]) / 1e3
        yield row, start[row["bytes"]] + extra, float(row["step_s"])


def read(path):
    """Rows of a file, which may hold the output of several runs."""
    lines = Path(path).read_text().splitlines()
    rows = [line for line in lines if line and line != lines[0]]
    return list(csv.DictReader([lines[0], *rows]))


def table(head, rows):
    print("| " + " | ".join(head) + " |", "|" + " --- |" * len(head), sep="\n")
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exchange", help="rows of `distributed exchange`")
    parser.add_argument("step", help="rows of `distributed step`, those of one process among them")
    parser.add_argument("cable", nargs="?", help="rows of `distributed step` after columns delay_ms and loss")
    parser.add_argument("--compute", type=float, nargs="*", default=[10.0, 0.1], help="seconds of a part")
    parser.add_argument("--spread", type=float, default=0.03, help="standard deviation of a part's time over its mean")
    options = parser.parse_args()
    steps = with_base(read(options.step))
    network = with_memory(fit(read(options.exchange)), steps)
    print(
        f"Fitted: an exchange takes {network.latency * 1e6:.0f} us and {network.peer * 1e6:.0f} us a peer, "
        f"a process takes in {network.memory / 1e9:.2f} GB/s, and {network.fresh / 1e9:.2f} GB/s above {FRESH >> 20} MiB.\n"
    )
    rows = []
    for row in steps:
        guess, found = predicted(network, row), float(row["step_s"])
        delays = [row["latency_us"], row["gbit"], row["spread"]]
        rows.append([row["ranks"], row["bytes"], row["parts"], *delays, f"{guess:.4f}", f"{found:.4f}", f"{guess / found - 1:+.1%}"])
    table(["ranks", "bytes", "parts", "latency, us", "Gb/s", "spread", "predicted, s", "measured, s", "error"], rows)
    if options.cable:
        print("Over a cable, from the step without a delay:\n")
        rows = [
            [row["bytes"], row["delay_ms"], row["loss"], f"{guess:.4f}", f"{found:.4f}", f"{guess / found - 1:+.0%}"]
            for row, guess, found in over_a_cable(read(options.cable))
        ]
        table(["bytes", "delay, ms", "loss", "predicted, s", "measured, s", "error"], rows)
    for compute in options.compute:
        print(f"Efficiency, {compute:g} s a part, spread {options.spread:g}:\n")
        rows = []
        for name, size in PAYLOADS.items():
            for net, (latency, bandwidth) in NETWORKS.items():
                wire = replace(network, bandwidth=bandwidth, wire=latency)  # on top of the software's own time
                shares = [f"{efficiency(wire, ranks, size, compute, options.spread):.0%}" for ranks in RANKS]
                exchanges = [f"{1e3 * wire.exchange(ranks, size):.3g}" for ranks in RANKS]
                rows.append([name, net, *shares, ", ".join(exchanges)])
        table(["trained", "network", *(f"{ranks} ranks" for ranks in RANKS), "exchange, ms"], rows)


if __name__ == "__main__":
    main()
