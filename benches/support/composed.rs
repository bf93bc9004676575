//! The layers of this crate's modules written with candle's own operations: what a user would write today.

use candle_core::{bail, Result, Tensor, D};
use candle_sam_lora::nn::{LayerNorm, Linear, Mode};
use candle_sam_lora::ops::{Activation, RelPosAttention};
use candle_sam_lora::sam::{SamVisionAttentionSplit, SamVisionEncoder, SamVisionLayer};
use candle_sam_lora::testing::composed;
use std::any::Any;

fn linear(
    layer: &Linear,
    x: &Tensor,
    activation: Activation,
    residual: Option<&Tensor>,
    mode: Mode,
) -> Result<Tensor> {
    let low_rank = layer.low_rank(mode)?;
    let Some(projection) = layer.projection(&low_rank) else {
        bail!("DoRA has no composed graph here")
    };
    composed::lora_linear(x, &projection, activation, residual)
}

fn layer_norm(norm: &LayerNorm, x: &Tensor) -> Result<Tensor> {
    composed::layer_norm(x, &norm.weight, &norm.bias, norm.eps)
}

/// `SamVisionAttentionSplit::forward`
pub fn attention(attn: &SamVisionAttentionSplit, x: &Tensor, mode: Mode) -> Result<Tensor> {
    let parts = [&attn.q, &attn.k, &attn.v]
        .map(|part| linear(part, x, Activation::Identity, None, mode))
        .into_iter()
        .collect::<Result<Vec<_>>>()?;
    let qkv = Tensor::cat(&parts, D::Minus1)?;
    let biases = [&attn.q, &attn.k, &attn.v].map(|part| part.bias.clone());
    let pad = match biases {
        [Some(q), Some(k), Some(v)] => Some(Tensor::cat(&[q, k, v], 0)?),
        _ => None,
    };
    let core = &attn.core;
    let config = RelPosAttention {
        num_heads: core.num_heads,
        softmax_scale: ((attn.q.out_dim() / core.num_heads) as f64).powf(-0.5),
        rel_pos: core.rel_pos_h.as_ref().zip(core.rel_pos_w.as_ref()),
        window: core.window,
        pad: pad.as_ref(),
        dropout: mode.dropout(core.dropout, core.stream),
    };
    let (out, _) = composed::rel_pos_attention(&qkv, &config)?;
    linear(&attn.proj, &out, Activation::Identity, None, mode)
}

/// `SamVisionLayer::forward`
pub fn block(layer: &SamVisionLayer, x: &Tensor, mode: Mode) -> Result<Tensor> {
    let Some(attn) = (layer.attn.as_ref() as &dyn Any).downcast_ref() else {
        bail!("the composed graph is that of SamVisionAttentionSplit")
    };
    let x = (x + attention(attn, &layer_norm(&layer.layer_norm1, x)?, mode)?)?;
    let mlp = &layer.mlp;
    let hidden =
        linear(&mlp.lin1, &layer_norm(&layer.layer_norm2, &x)?, mlp.activation, None, mode)?;
    linear(&mlp.lin2, &hidden, Activation::Identity, Some(&x), mode)
}

/// `SamVisionEncoder::forward`; patches and neck, which have no composed form, as they are.
pub fn encoder(encoder: &SamVisionEncoder, pixel_values: &Tensor, mode: Mode) -> Result<Tensor> {
    let mut x = encoder.patch_embed.forward(pixel_values, mode)?;
    if let Some(pos_embed) = &encoder.pos_embed {
        x = x.broadcast_add(pos_embed)?;
    }
    for layer in &encoder.layers {
        x = block(layer, &x, mode)?;
    }
    encoder.neck.forward(&x, mode)?.permute((0, 3, 1, 2))
}
