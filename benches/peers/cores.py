"""The attention alone, by implementation: `(q, k, v, rel_h, rel_w, scale) -> out`, `[B heads, N, d]`, rel_h, rel_w
`[B heads, N, side]`."""

import torch
import torch.nn.functional as F


def padded_bias(rel_h, rel_w):
    """The N x N bias that SDPA wants."""
    return (rel_h[..., :, None] + rel_w[..., None, :]).flatten(-2)


def eager(q, k, v, rel_h, rel_w, scale):
    scores = (q * scale) @ k.transpose(-2, -1) + padded_bias(rel_h, rel_w)
    return torch.softmax(scores, dtype=torch.float32, dim=-1).to(q.dtype) @ v


def sdpa(q, k, v, rel_h, rel_w, scale):
    # 4 dimensions: the fused kernels refuse 3.
    bias = padded_bias(rel_h, rel_w)
    q, k, v, bias = (x.unsqueeze(0) for x in (q, k, v, bias))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale)[0]


def sdpa_without_bias(q, k, v, rel_h, rel_w, scale):
    q, k, v = (x.unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, scale=scale)[0]


CORES = {"eager": eager, "sdpa": sdpa, "sdpa_without_bias": sdpa_without_bias}
