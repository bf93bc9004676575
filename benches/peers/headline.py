"""PyTorch on the layers that `headline` of tests/gpu times, all in one process: it takes seconds to import.

    python benches/peers/headline.py
    python benches/peers/headline.py --device cpu --small       that everything runs

A line of JSON for each measurement, under the name that ours has. The attention is `sdpa` with the N x N bias made from q
and the tables, as Hugging Face's SAM has it. `sdpa_without_bias` computes something else, and bounds `sdpa`. `cublas` is the
plain product without LoRA. FlexAttention comes last, since its compilation takes half a minute.
"""

import argparse
import itertools
import json
import statistics
import time

import torch
import torch.nn.functional as F

from cores import CORES

# Inputs take turns, so that none is in a GPU's cache (H200: 50 MB).
CACHE = 100 << 20
WINDOW = 14


def seconds_of(args, runs, run):
    """Seconds of one run: the mean of `runs`."""
    if args.device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(runs):
            run()
        return (time.perf_counter() - begun) / runs
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(runs):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / runs


def measure(args, run):
    """The median, least and most of five batches of 20 ms."""
    batches, batch_s = (1, 0.0) if args.small else (5, 0.02)
    seconds_of(args, 1, run)
    runs = int(min(max(batch_s / seconds_of(args, 1, run), 1), 2000))
    if runs > 1:
        seconds_of(args, runs, run)
    times = [1e6 * seconds_of(args, runs, run) for _ in range(batches)]
    return {"us": statistics.median(times), "least_us": min(times), "most_us": max(times), "runs": runs}


def say(args, name, implementation, flops, prepare):
    """Measures what `prepare` makes, and prints the line."""
    row = {"name": name, "implementation": implementation, "from": time.time()}
    try:
        row |= measure(args, prepare())
        row["tflops"] = flops / row["us"] / 1e6
    except Exception as error:  # another version of PyTorch may lack one of them
        row["failed"] = f"{type(error).__name__}: {error}"
    print(json.dumps(row | {"until": time.time()}), flush=True)


def normal(args, *shape, scale=1.0):
    return torch.randn(shape, device=args.device, dtype=args.torch_dtype) * scale


def in_turns(args, tensor):
    """Copies of a tensor, one after the other without end."""
    bytes = tensor.numel() * tensor.element_size()
    count = 1 if args.small else CACHE // bytes + 1
    return [tensor, *(tensor.clone() for _ in range(count - 1))]


def attention(args, core, heads, dim, side, count, backward):
    """From packed qkv of `count` grids or windows of `side` to the heads side by side."""
    index = torch.arange(side)[:, None] - torch.arange(side)[None, :] + side - 1
    gathered = normal(args, 2, 2 * side - 1, dim, scale=0.3)[:, index]
    copies = in_turns(args, normal(args, count, side * side, 3 * heads * dim))
    grad = normal(args, count, side * side, heads * dim)

    def forward(qkv):
        q, k, v = qkv.view(count, side * side, 3, heads, dim).permute(2, 0, 3, 1, 4).flatten(1, 2)
        rows = q.view(-1, side, side, dim)
        rel_h = torch.einsum("bhwc,hkc->bhwk", rows, gathered[0]).flatten(1, 2)
        rel_w = torch.einsum("bhwc,wkc->bhwk", rows, gathered[1]).flatten(1, 2)
        out = core(q, k, v, rel_h, rel_w, dim**-0.5)
        return out.view(count, heads, side * side, dim).transpose(1, 2).flatten(2)

    return run_of(forward, copies, grad, backward)


def run_of(forward, copies, grad, backward):
    """Forward, or backward down to the input alone, on each of the copies in turn."""
    if not backward:
        copies = itertools.cycle(copies)

        def run():
            with torch.no_grad():
                forward(next(copies))

        return run
    graphs = [(forward(x.requires_grad_()), x) for x in copies]
    graphs = itertools.cycle(graphs)

    def run():
        out, x = next(graphs)
        torch.autograd.grad(out, x, grad, retain_graph=True)

    return run


def product(args, rows, in_dim, out_dim, then, backward):
    weight, bias = normal(args, out_dim, in_dim, scale=in_dim**-0.5), normal(args, out_dim)
    copies = in_turns(args, normal(args, rows, in_dim))
    residual = normal(args, rows, out_dim)
    forward = lambda x: then(F.linear(x, weight, bias), residual)
    return run_of(forward, copies, normal(args, rows, out_dim), backward)


def layers(args):
    """(name of ours, implementation, operations, what makes the run)"""
    flex = []
    for backward in (False, True):
        way, products = ("backward", 5) if backward else ("forward", 2)
        for heads, dim in [(12, 64), (16, 80)]:
            heads = 1 if args.small else heads
            grid = 16 if args.small else 64
            tokens = grid * grid
            flops = products * 2 * tokens * tokens * heads * dim
            name = f"attention_global_{dim} {way} batch 1 grid {grid}"
            for core in ("sdpa_without_bias", "sdpa"):
                make = lambda core=CORES[core], heads=heads, dim=dim, b=backward, grid=grid: attention(
                    args, core, heads, dim, grid, 1, b
                )
                yield name, core, flops, make
            if not backward and dim == 64:
                flex.append((name, flops, heads, dim, grid))
        # 70 x 70 tokens, padding included.
        batch, windows = (1, 4) if args.small else (8, 25)
        heads = 1 if args.small else 12
        flops = products * 2 * batch * grid * grid * WINDOW**2 * heads * 64
        name = f"attention_windows_64 {way} batch {batch} grid {grid}"
        make = lambda b=backward, heads=heads, count=batch * windows: attention(
            args, CORES["sdpa"], heads, 64, WINDOW, count, b
        )
        yield name, "sdpa", flops, make
        batch, dim = (1, 64) if args.small else (4, 768)
        rows = batch * grid * grid
        for layer, in_dim, out_dim, then in [
            ("qkv_lora", dim, 3 * dim, lambda y, _: y),
            ("lin1_gelu", dim, 4 * dim, lambda y, _: F.gelu(y)),
            ("lin2", 4 * dim, dim, lambda y, residual: y + residual),
        ]:
            make = lambda i=in_dim, o=out_dim, t=then, b=backward, rows=rows: product(args, rows, i, o, t, b)
            yield f"{layer} {way} batch {batch} grid {grid}", "cublas", 2 * rows * in_dim * out_dim, make
    if args.device.type == "cuda":
        for name, flops, heads, dim, grid in flex:
            yield name, "flex", flops, lambda: attention(args, flex_core(grid), heads, dim, grid, 1, False)


def flex_core(side):
    import cuda_attention

    return cuda_attention.CORES["flex"](side)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--dtype", default="bf16", choices=["f32", "bf16", "f16"])
    parser.add_argument("--small", action="store_true")
    args = parser.parse_args()
    args.torch_dtype = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}[args.dtype]
    torch.manual_seed(0)
    for layer in layers(args):
        say(args, *layer)


if __name__ == "__main__":
    main()
