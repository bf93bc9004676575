//! The operations written with candle's own: the way one would write them without this crate, but for the gradients
//! that are sums over rows. Those are taken in f32, see [`scale_shift`].
//!
//! Differentiable in everything, weights included, but they hold every intermediate; the attention builds its
//! N x N weights. They are the oracle of the fused operations and the path for what those do not cover. Shapes that do
//! not fit are errors of candle's, without the names that the fused operations give. The attention checks as the fused
//! operations do.

use super::product::{matmul, product};
use super::{broadcast_add, repeat, scale_shift};
use super::{resize_linear, Activation, Projection, RelPosAttention};
use candle_core::{bail, DType, Result, Tensor, D};

/// LayerNorm over the last dimension; statistics in f32.
///
/// [Example](crate::testing::composed)
pub fn layer_norm(x: &Tensor, weight: &Tensor, bias: &Tensor, eps: f64) -> Result<Tensor> {
    let x32 = x.to_dtype(DType::F32)?;
    let centred = x32.broadcast_sub(&x32.mean_keepdim(D::Minus1)?)?;
    let var = centred.sqr()?.mean_keepdim(D::Minus1)?;
    let normed = centred.broadcast_div(&(var + eps)?.sqrt()?)?.to_dtype(x.dtype())?;
    scale_shift(&normed, Some(weight), Some(bias))
}

/// One projection with LoRA, activation and residual.
///
/// [Example](crate::testing)
pub fn lora_linear(
    x: &Tensor,
    projection: &Projection<'_>,
    activation: Activation,
    residual: Option<&Tensor>,
) -> Result<Tensor> {
    let mut out_dims = x.dims().to_vec();
    let in_dim = out_dims.pop().unwrap_or(1);
    out_dims.push(projection.weight.dim(0)?);
    let rows = x.reshape(((), in_dim))?;
    let mut y = product(&rows, &projection.float_weight()?.t()?, None, x.dtype())?;
    if let Some(bias) = projection.bias {
        y = broadcast_add(&y, bias)?;
    }
    if let Some(lora) = &projection.lora {
        let s = (product(&rows, &lora.a.t()?, lora.dropout, lora.a.dtype())? * lora.scaling)?;
        let mut low_rank = product(&s, &lora.b.t()?, None, x.dtype())?;
        if let Some(bias) = lora.b_bias {
            low_rank = broadcast_add(&low_rank, &(bias * lora.scaling)?)?;
        }
        y = (y + low_rank)?;
    }
    let y = activation.apply(&y)?.reshape(out_dims)?;
    residual.map_or(Ok(y.clone()), |residual| residual + &y)
}

/// Three projections, concatenated along the last dimension.
///
/// [Example](crate::testing::composed)
pub fn lora_qkv(x: &Tensor, projections: &[Projection<'_>; 3]) -> Result<Tensor> {
    let parts = projections
        .iter()
        .map(|projection| lora_linear(x, projection, Activation::Identity, None))
        .collect::<Result<Vec<_>>>()?;
    Tensor::cat(&parts, D::Minus1)
}

/// Attention with partition, padding and crop as copies. Returns the output `[B, H, W, C]` and the attention weights
/// `[B * windows, heads, N, N]`.
///
/// [Example](crate::testing::composed)
///
/// # Errors
/// As [`rel_pos_attention`](super::rel_pos_attention()).
pub fn rel_pos_attention(qkv: &Tensor, config: &RelPosAttention<'_>) -> Result<(Tensor, Tensor)> {
    let [batch, h, w, packed] = config.validate(qkv)?;
    let (heads, dim) = (config.num_heads, packed / 3 / config.num_heads);
    let windows = match config.window {
        Some(side) => partition(qkv, side, config.pad)?,
        None => qkv.clone(),
    };
    let (count, side_h, side_w, _) = windows.dims4()?;
    let tokens = side_h * side_w;
    // [3, count, heads, N, d]
    let split = windows.reshape((count, tokens, 3, heads, dim))?.permute((2, 0, 3, 1, 4))?;
    let part = |i: usize| split.get(i)?.contiguous()?.reshape((count * heads, tokens, dim));
    let (q, k, v) = (part(0)?, part(1)?, part(2)?);
    let mut scores = matmul(&(&q * config.softmax_scale)?, &k.transpose(1, 2)?)?;
    if let Some((rel_pos_h, rel_pos_w)) = config.rel_pos {
        let grid = q.reshape((count * heads, side_h, side_w, dim))?;
        // rel_h[b, h, w, kh] = sum_d q[b, h, w, d] Rh[h, kh, d], one matrix product per query row.
        let rel_h = {
            let rows = grid.permute((1, 0, 2, 3))?.contiguous()?;
            let rows = rows.reshape((side_h, count * heads * side_w, dim))?;
            let r = relative_table(rel_pos_h, side_h)?;
            let rel = matmul(&rows, &r.transpose(1, 2)?.contiguous()?)?;
            rel.reshape((side_h, count * heads, side_w, side_h))?.permute((1, 0, 2, 3))?
        };
        let rel_w = {
            let cols = grid.permute((2, 0, 1, 3))?.contiguous()?;
            let cols = cols.reshape((side_w, count * heads * side_h, dim))?;
            let r = relative_table(rel_pos_w, side_w)?;
            let rel = matmul(&cols, &r.transpose(1, 2)?.contiguous()?)?;
            rel.reshape((side_w, count * heads, side_h, side_w))?.permute((1, 2, 0, 3))?
        };
        let grid = (count * heads, side_h, side_w, side_h, side_w);
        scores = broadcast_add(&scores.reshape(grid)?, &rel_h.unsqueeze(4)?)?;
        scores = broadcast_add(&scores, &rel_w.unsqueeze(3)?)?;
        scores = scores.reshape((count * heads, tokens, tokens))?;
    }
    let weights = candle_nn::ops::softmax(&scores.to_dtype(DType::F32)?, D::Minus1)?;
    let weights = weights.to_dtype(qkv.dtype())?;
    let dropped = match config.dropout {
        Some(dropout) => super::dropout(&weights, dropout)?,
        None => weights.clone(),
    };
    let out = matmul(&dropped, &v)?
        .reshape((count, heads, side_h, side_w, dim))?
        .permute((0, 2, 3, 1, 4))?
        .reshape((count, side_h, side_w, heads * dim))?;
    let out = match config.window {
        Some(side) => unpartition(&out, side, (batch, h, w))?,
        None => out,
    };
    Ok((out, weights.reshape((count, heads, tokens, tokens))?))
}

/// Attention between two sets of tokens; q, k and v in `[batch, heads, tokens, d]` as copies.
///
/// [Example](crate::testing::composed)
pub fn multi_head_attention(
    [q, k, v]: [&Tensor; 3],
    num_heads: usize,
    softmax_scale: f64,
) -> Result<Tensor> {
    let batch = q.dim(0)?.max(k.dim(0)?);
    let heads = |x: &Tensor| {
        let (entries, tokens, channels) = x.dims3()?;
        let x = if entries == batch { x.clone() } else { repeat(x, (batch, tokens, channels))? };
        x.reshape((batch, tokens, num_heads, ()))?.transpose(1, 2)?.contiguous()
    };
    let (q, k, v) = (heads(q)?, heads(k)?, heads(v)?);
    let scores = (matmul(&q, &k.t()?)? * softmax_scale)?.to_dtype(DType::F32)?;
    let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
    matmul(&weights, &v)?.transpose(1, 2)?.flatten_from(2)
}

/// `R[i, j] = table[i - j + side - 1]`: `[2 side - 1, d] -> [side, side, d]`; a table of another length is resized.
fn relative_table(table: &Tensor, side: usize) -> Result<Tensor> {
    let index: Vec<u32> =
        (0..side).flat_map(|i| (0..side).map(move |j| (i + side - 1 - j) as u32)).collect();
    let index = Tensor::from_vec(index, side * side, table.device())?;
    // In f32, where the backward adds up the rows that share an entry; and candle selects rows of contiguous tables
    // only.
    let rows = resize_linear(&table.to_dtype(DType::F32)?, 2 * side - 1)?.contiguous()?;
    rows.index_select(&index, 0)?.to_dtype(table.dtype())?.reshape((side, side, ()))
}

/// Splits a grid into square windows, filling what hangs over with `pad` (zero if none):
/// `[B, H, W, X] -> [B * windows, side, side, X]`.
///
/// [Example](crate::testing::composed)
///
/// # Errors
/// When the side is 0, or shapes do not fit.
pub fn partition(x: &Tensor, side: usize, pad: Option<&Tensor>) -> Result<Tensor> {
    let (batch, h, w, channels) = x.dims4()?;
    if side == 0 {
        bail!("partition: the side of the windows must be positive")
    }
    let (rows, cols) = (h.div_ceil(side), w.div_ceil(side));
    let filled = |dims: (usize, usize, usize, usize)| match pad {
        Some(pad) => repeat(&pad.reshape((1, 1, 1, channels))?, dims),
        None => Tensor::zeros(dims, x.dtype(), x.device()),
    };
    let mut x = x.clone();
    if cols * side > w {
        x = Tensor::cat(&[x, filled((batch, h, cols * side - w, channels))?], 2)?;
    }
    if rows * side > h {
        x = Tensor::cat(&[x, filled((batch, rows * side - h, cols * side, channels))?], 1)?;
    }
    x.reshape(vec![batch, rows, side, cols, side, channels])?
        .permute(vec![0, 1, 3, 2, 4, 5])?
        .reshape((batch * rows * cols, side, side, channels))
}

/// Undoes [`partition`], cropping what hung over: `[B * windows, side, side, X] -> [B, H, W, X]`.
///
/// [Example](crate::testing::composed)
///
/// # Errors
/// As [`partition`].
pub fn unpartition(
    windows: &Tensor,
    side: usize,
    (batch, h, w): (usize, usize, usize),
) -> Result<Tensor> {
    if side == 0 {
        bail!("unpartition: the side of the windows must be positive")
    }
    let (rows, cols) = (h.div_ceil(side), w.div_ceil(side));
    let channels = windows.dim(D::Minus1)?;
    windows
        .reshape(vec![batch, rows, cols, side, side, channels])?
        .permute(vec![0, 1, 3, 2, 4, 5])?
        .reshape((batch, rows * side, cols * side, channels))?
        .narrow(1, 0, h)?
        .narrow(2, 0, w)?
        .contiguous()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::Device;

    /// Longer and shorter ones than the grid's sides ask for.
    #[test]
    fn tables_of_other_lengths_are_resized_as_the_fused_operation_does() -> Result<()> {
        let values = |count: usize, shape: &[usize]| {
            let values: Vec<f32> = (0..count).map(|i| (i as f32 * 0.7).sin()).collect();
            Tensor::from_vec(values, shape, &Device::Cpu)
        };
        let qkv = values(4 * 3 * 24, &[1, 4, 3, 24])?;
        let (long, short) = (values(11 * 4, &[11, 4])?, values(2 * 4, &[2, 4])?);
        for tables in [(&long, &short), (&short, &long)] {
            let config = RelPosAttention {
                num_heads: 2,
                softmax_scale: 0.5,
                rel_pos: Some(tables),
                window: None,
                pad: None,
                dropout: None,
            };
            let fused = super::super::rel_pos_attention(&qkv, &config)?;
            let (composed, _) = rel_pos_attention(&qkv, &config)?;
            let error = (fused - composed)?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(error < 1e-5, "{error}");
        }
        Ok(())
    }
}
