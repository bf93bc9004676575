"""Attention with decomposed relative positions on CUDA: FlexAttention, and a Triton kernel of our own.

Both take `(q, k, v, rel_h, rel_w, scale)`, q, k, v `[B heads, N, d]`, rel_h, rel_w `[B heads, N, side]`, and never build
the N x N bias:

    S[n, m] = scale q_n . k_m + rel_h[n, m / side] + rel_w[n, m % side],    out = softmax(S) v

The Triton kernel is forward only, in the manner of the published ones. It has one program per block of queries, and an
online softmax over blocks of keys. These blocks are whole rows of the grid, so that rel_w is one register tile for all of them.
`TRITON_INTERPRET=1 python benches/peers/cuda_attention.py` compares both with eager on the CPU.
"""

import torch
import triton
import triton.language as tl
from torch.nn.attention.flex_attention import flex_attention


def flex(side, compiled=True):
    """FlexAttention: the relative positions as its score_mod, which autograd goes through."""
    run = torch.compile(flex_attention, dynamic=False) if compiled else flex_attention

    def core(q, k, v, rel_h, rel_w, scale):
        def add_positions(score, batch, head, query, key):
            return score + rel_h[head, query, key // side] + rel_w[head, query, key % side]

        q, k, v = (x.unsqueeze(0) for x in (q, k, v))
        return run(q, k, v, score_mod=add_positions, scale=scale)[0]

    return core


@triton.jit
def rel_pos_kernel(
    q, k, v, rel_h, rel_w, out, tokens, scale,
    SIDE: tl.constexpr, SIDE_PADDED: tl.constexpr, DIM: tl.constexpr, DIM_PADDED: tl.constexpr, QUERIES: tl.constexpr,
):  # fmt: skip
    LOG2E: tl.constexpr = 1.4426950408889634
    head = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    cols, dims = tl.arange(0, SIDE_PADDED), tl.arange(0, DIM_PADDED)
    real_rows, real_cols, real_dims = rows < tokens, cols < SIDE, dims < DIM
    q_at = head * tokens * DIM + rows[:, None] * DIM + dims[None, :]
    q_mask = real_rows[:, None] & real_dims[None, :]
    q_tile = tl.load(q + q_at, mask=q_mask, other=0.0)
    w_at = head * tokens * SIDE + rows[:, None] * SIDE + cols[None, :]
    w_tile = tl.load(rel_w + w_at, mask=real_rows[:, None] & real_cols[None, :], other=0.0).to(tl.float32) * LOG2E
    w_tile = tl.where(real_cols[None, :], w_tile, float("-inf"))
    maximum = tl.full([QUERIES], float("-inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    accumulated = tl.zeros([QUERIES, DIM_PADDED], tl.float32)
    for row in range(SIDE):
        kv_at = head * tokens * DIM + (row * SIDE + cols)[:, None] * DIM + dims[None, :]
        kv_mask = real_cols[:, None] & real_dims[None, :]
        k_tile = tl.load(k + kv_at, mask=kv_mask, other=0.0)
        h = tl.load(rel_h + head * tokens * SIDE + rows * SIDE + row, mask=real_rows, other=0.0).to(tl.float32) * LOG2E
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * (scale * LOG2E) + w_tile + h[:, None]
        new_maximum = tl.maximum(maximum, tl.max(scores, 1))
        weights = tl.exp2(scores - new_maximum[:, None])
        correction = tl.exp2(maximum - new_maximum)
        total = total * correction + tl.sum(weights, 1)
        v_tile = tl.load(v + kv_at, mask=kv_mask, other=0.0)
        accumulated = accumulated * correction[:, None]
        accumulated += tl.dot(weights.to(v_tile.dtype), v_tile, input_precision="ieee")
        maximum = new_maximum
    result = accumulated / total[:, None]
    tl.store(out + q_at, result.to(out.dtype.element_ty), mask=q_mask)


def padded(size):
    """The size as `tl.arange` and `tl.dot` need it."""
    return max(16, triton.next_power_of_2(size))


def triton_core(q, k, v, rel_h, rel_w, scale, side):
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise SystemExit("triton: this kernel is forward only")
    q, k, v, rel_h, rel_w = (x.contiguous() for x in (q, k, v, rel_h, rel_w))
    heads, tokens, dim = q.shape
    out, queries = torch.empty_like(q), 64
    rel_pos_kernel[(triton.cdiv(tokens, queries), heads)](
        q, k, v, rel_h, rel_w, out, tokens, scale,
        SIDE=side, SIDE_PADDED=padded(side), DIM=dim, DIM_PADDED=padded(dim), QUERIES=queries,
    )  # fmt: skip
    return out


def core_triton(side):
    return lambda *inputs: triton_core(*inputs, side=side)


CORES = {"flex": flex, "triton": core_triton}


def check():
    from cores import CORES as EAGER_CORES

    for side, dim in [(16, 64), (14, 80)]:
        q, k, v = torch.randn(3, 2, side * side, dim)
        rel_h, rel_w = torch.randn(2, 2, side * side, side)
        inputs = (q, k, v, rel_h, rel_w, dim**-0.5)
        expected = EAGER_CORES["eager"](*inputs)
        for name, core in {"flex": flex(side, compiled=False), "triton": core_triton(side)}.items():
            error = (core(*inputs) - expected).abs().max().item()
            print(f"{name} side {side} head_dim {dim}: largest error {error:.1e}")
            assert error < 1e-5


if __name__ == "__main__":
    check()
