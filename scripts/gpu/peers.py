#!/usr/bin/env python3
"""PyTorch at the sizes of tests/gpu/bench.rs, under the same names; one JSON object a line, medians in nanoseconds."""

import json
import statistics
import sys
import time

import torch
import torch.nn.functional as F

WARM_UP, RUNS = 5, 30
DTYPE, DEVICE = torch.bfloat16, "cuda"


def tensor(*shape, scale=1.0, grad=False):
    return (torch.randn(*shape, device=DEVICE) * scale).to(DTYPE).requires_grad_(grad)


def layer_norm():
    x, weight, bias = tensor(4096, 768, grad=True), tensor(768), tensor(768)
    return lambda: F.layer_norm(x, (768,), weight, bias, 1e-6)


def lora_qkv():
    x = tensor(4096, 768, grad=True)
    weight, bias = tensor(3 * 768, 768, scale=0.04), tensor(3 * 768)
    a = [tensor(16, 768, scale=0.04, grad=True) for _ in range(2)]
    b = [tensor(768, 16, scale=0.04, grad=True) for _ in range(2)]

    def forward():
        q, k, v = F.linear(x, weight, bias).chunk(3, -1)
        q, v = (y + F.linear(F.linear(x, a), b) for y, a, b in zip((q, v), a, b))
        return torch.cat([q, k, v], -1)

    return forward


def attention(side, windows):
    """SAM's attention as transformers has it: the bias of relative positions as a mask of scaled_dot_product_attention."""
    heads, dim = 12, 64
    qkv = tensor(3, windows * heads, side * side, dim, grad=True)
    tables = [tensor(2 * side - 1, dim, scale=0.3, grad=True) for _ in range(2)]
    index = torch.arange(side, device=DEVICE)[:, None] - torch.arange(side, device=DEVICE)[None] + side - 1

    def forward():
        q, k, v = qkv.unbind(0)
        grid = q.reshape(-1, side, side, dim)
        h = torch.einsum("bhwc,hkc->bhwk", grid, tables[0][index])
        w = torch.einsum("bhwc,wkc->bhwk", grid, tables[1][index])
        bias = (h[..., :, None] + w[..., None, :]).reshape(-1, side * side, side * side)
        split = [t.reshape(windows, heads, side * side, dim) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*split, attn_mask=bias.reshape(windows, heads, side * side, -1))

    return forward


def median(run):
    times = []
    for i in range(WARM_UP + RUNS):
        torch.cuda.synchronize()
        start = time.perf_counter_ns()
        run()
        torch.cuda.synchronize()
        if i >= WARM_UP:
            times.append(time.perf_counter_ns() - start)
    return statistics.median(times)


def main():
    benches = {
        "layer_norm 4096x768": layer_norm,
        "lora_qkv 4096x768 r16": lora_qkv,
        "attention global 64x64 12x64": lambda: attention(64, 1),
        # 64 = 5 windows of 14 with padding; partition and padding themselves are not timed here.
        "attention window 14 12x64": lambda: attention(14, 25),
    }
    for name, make in benches.items():
        for path, wrap in [("torch eager", lambda f: f), ("torch compile", torch.compile)]:
            try:
                forward = wrap(make())
                passes = {"forward": forward, "forward+backward": lambda: forward().sum().backward()}
                for what, run in passes.items():
                    print(json.dumps({"name": f"{name} bf16 {path} {what}", "median": median(run)}), flush=True)
            except Exception as error:  # a peer that cannot run is left out; the log says why
                print(f"{name} {path}: {error}", file=sys.stderr)


if __name__ == "__main__":
    main()
