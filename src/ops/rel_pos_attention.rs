//! Attention with decomposed relative positions, as SAM's image encoder has it, global or in windows.
//!
//! ```text
//! S[n, m] = softmax_scale q_n . k_m + rel_h[n, h_m] + rel_w[n, w_m]            O = dropout(softmax(S)) V
//! rel_h[n, kh] = q_n . Rh[h_n - kh + K_h - 1]      rel_w[n, kw] = q_n . Rw[w_n - kw + K_w - 1]     (unscaled q)
//! ```
//! Input and output are whole grids, `[B, H, W, ..]`. Windows are a matter of addressing: where the last window of
//! a row or column hangs over the grid, the keys and values outside are the `pad` vector (SAM pads with zeros
//! *before* the projection, so they are its bias), they take part in the softmax, and their queries do not exist.
//!
//! Source: `segment_anything/modeling/image_encoder.py`.

use super::cpu::{Chain, Layer, Residual};
use super::custom::{engine, Engine};
use super::{check, composed, resize_linear};
#[cfg(feature = "cuda")]
use super::{computed, custom::operand, params};
use crate::launch::rel_pos_attention as kernels;
#[cfg(feature = "cuda")]
use crate::launch::Gpu;
use crate::philox::Dropout;
use crate::problem::AttentionProblem;
use candle_core::{bail, Result, Tensor};
use std::sync::Once;

const OP: &str = AttentionProblem::OP;
/// Largest side of a window.
const MAX_WINDOW: usize = 1024;

/// Everything of [`rel_pos_attention`] but its input.
#[derive(Clone, Copy, Debug)]
pub struct RelPosAttention<'a> {
    /// Number of heads; it divides C.
    pub num_heads: usize,
    /// Factor of `q . k`; `head_dim^-0.5` in SAM.
    pub softmax_scale: f64,
    /// The tables `rel_pos_h` and `rel_pos_w`, `[L, head_dim]` each, shared by the heads. A table of another
    /// length than `2 * side - 1` is resized linearly.
    pub rel_pos: Option<(&'a Tensor, &'a Tensor)>,
    /// Side of the square windows; none for global attention.
    pub window: Option<usize>,
    /// What a padded token projects to, `[3C]`: the bias of the qkv projection. None is zero.
    pub pad: Option<&'a Tensor>,
    /// Dropout on the attention weights, over `[windows, heads, queries, keys]` seen as rows of keys.
    pub dropout: Option<Dropout>,
}

/// Attention over a grid: packed `qkv [B, H, W, 3C] -> [B, H, W, C]`.
///
/// Gradients go to `qkv`, the tables and `pad`. On the CPU, and on a GPU whose kernels cover the shape, nothing of size
/// N x N is allocated. On Metal, on GPUs before 8.0, and for shapes that no kernel covers, such as a head dim above 80,
/// a graph of candle's operations runs and holds the N x N weights; a process is warned of that once.
///
/// # Errors
/// On shapes that do not fit, mixed dtypes or devices, a window of 0, non-finite scale, impossible dropout.
pub fn rel_pos_attention(qkv: &Tensor, config: &RelPosAttention<'_>) -> Result<Tensor> {
    let (problem, tables, pad) = prepare(qkv, config)?;
    let dtype = qkv.dtype();
    let engine = engine(qkv.device(), dtype, |gpu| {
        kernels::plan(&problem, dtype, gpu).map(|plan| plan.family())
    })?;
    run(qkv, config, (problem, tables, pad), engine)
}

/// Tells once a process that attention holds its weights.
fn tell_of_weights(qkv: &Tensor, problem: &AttentionProblem) {
    static TOLD: Once = Once::new();
    TOLD.call_once(|| {
        let (dtype, tokens, dim) = (qkv.dtype().as_str(), problem.tokens(), problem.head_dim);
        let line = format!(
            "{OP}: no kernel of this GPU computes {tokens} tokens of head dim {dim} in {dtype}; candle's operations do, \
             which hold all {tokens} x {tokens} weights (told once)"
        );
        tracing::warn!("{line}");
        eprintln!("candle-sam-lora: {line}");
    });
}

/// [`rel_pos_attention`] by one engine, for the self-test and measurements.
///
/// # Errors
/// As [`rel_pos_attention`], and on problems that no kernel covers.
#[cfg(feature = "cuda")]
pub(super) fn by(qkv: &Tensor, config: &RelPosAttention<'_>, engine: Engine) -> Result<Tensor> {
    run(qkv, config, prepare(qkv, config)?, engine)
}

fn run(
    qkv: &Tensor,
    config: &RelPosAttention<'_>,
    prepared: Prepared<'_>,
    engine: Engine,
) -> Result<Tensor> {
    match engine {
        Engine::Cpu => {
            let mut chain = Chain::new(OP, qkv);
            chain.push(layer(prepared));
            chain.run(Residual::None)
        }
        #[cfg(feature = "cuda")]
        Engine::Gpu(gpu) => on_gpu(qkv, prepared, gpu),
        Engine::Composed => {
            let (problem, tables, pad) = prepared;
            let config =
                RelPosAttention { rel_pos: tables.as_ref().map(|[h, w]| (h, w)), pad, ..*config };
            tell_of_weights(qkv, &problem);
            Ok(composed::rel_pos_attention(qkv, &config)?.0)
        }
    }
}

/// The layer as the CPU engine runs it, and its parameters.
pub(super) fn layer((problem, tables, pad): Prepared<'_>) -> (Layer, Vec<Tensor>) {
    let parameters = tables.into_iter().flatten().chain(pad.cloned()).collect();
    (Layer::Attention { problem, pad: pad.is_some() }, parameters)
}

#[cfg(feature = "cuda")]
fn on_gpu(qkv: &Tensor, (problem, tables, pad): Prepared<'_>, gpu: Gpu) -> Result<Tensor> {
    use super::gpu::rel_pos_attention::Attention;
    let qkv = operand(qkv)?;
    let frozen = match &tables {
        Some(tables) => params::in_place(tables, Tensor::dtype)?,
        None => None,
    };
    let frozen: Option<[Tensor; 2]> = frozen.and_then(|tables| tables.try_into().ok());
    let input = tables.filter(|_| frozen.is_none());
    let input = input.map(|tables| operand(&Tensor::cat(&tables, 0)?)).transpose()?;
    let pad = pad.map(operand).transpose()?;
    let inputs = (&qkv, input.as_ref(), pad.as_ref());
    let pad = pad.is_some();
    let attention = Attention { problem: &problem, tables: frozen.as_ref(), pad, gpu };
    let (out, shape, lse) =
        computed::with_cuda_storages(OP, inputs, |inputs| attention.forward(inputs))?;
    let out = (candle_core::Storage::Cuda(out), shape);
    computed::node(OP, inputs, out, move |inputs, value, grad| {
        let tables = frozen.as_ref();
        let attention = Attention { problem: &problem, tables, pad, gpu };
        attention.backward(inputs, (value, &lse), grad)
    })
}

/// Tables of the lengths that a problem wants.
type Tables = Option<[Tensor; 2]>;

/// The problem, its tables, and the pad where padding takes part.
type Prepared<'a> = (AttentionProblem, Tables, Option<&'a Tensor>);

/// Checks everything and describes the problem.
pub(super) fn prepare<'a>(qkv: &Tensor, config: &RelPosAttention<'a>) -> Result<Prepared<'a>> {
    let (h, w) = validate(qkv, config)?;
    let (side_h, side_w) = config.window.map_or((h, w), |window| (window, window));
    let tables = match config.rel_pos {
        None => None,
        Some((rel_pos_h, rel_pos_w)) => Some([
            resize_linear(rel_pos_h, 2 * side_h - 1)?,
            resize_linear(rel_pos_w, 2 * side_w - 1)?,
        ]),
    };
    let (batch, _, _, packed) = qkv.dims4()?;
    let problem = AttentionProblem {
        batch,
        h,
        w,
        num_heads: config.num_heads,
        head_dim: packed / 3 / config.num_heads,
        side_h,
        side_w,
        softmax_scale: config.softmax_scale as f32,
        rel_pos: config.rel_pos.is_some(),
        dropout: config.dropout,
    };
    let padded = h % side_h != 0 || w % side_w != 0;
    Ok((problem, tables, config.pad.filter(|_| padded)))
}

/// Checks everything; returns the grid.
pub(super) fn validate(qkv: &Tensor, config: &RelPosAttention<'_>) -> Result<(usize, usize)> {
    check::float(OP, "qkv", qkv)?;
    let &[_, h, w, packed] = qkv.dims() else {
        bail!("{OP}: qkv must have shape [B, H, W, 3C], got {:?}", qkv.dims())
    };
    check::not_empty(OP, "qkv", qkv)?;
    let heads = config.num_heads;
    if heads == 0 || packed % 3 != 0 || (packed / 3) % heads != 0 {
        bail!("{OP}: qkv's last dimension must be 3 x {heads} heads x head_dim, got {packed}")
    }
    let head_dim = packed / 3 / heads;
    if let Some((rel_pos_h, rel_pos_w)) = config.rel_pos {
        for (name, table) in [("rel_pos_h", rel_pos_h), ("rel_pos_w", rel_pos_w)] {
            if table.rank() != 2 || table.dims()[0] == 0 || table.dims()[1] != head_dim {
                bail!("{OP}: {name} must have shape [length, {head_dim}], got {:?}", table.dims())
            }
            check::same_kind(OP, name, table, qkv)?;
        }
    }
    // A window far larger than the grid is all padding; the bound keeps its size from overflowing.
    if let Some(window) = config.window.filter(|&window| window == 0 || window > MAX_WINDOW) {
        bail!("{OP}: the window must be 1 to {MAX_WINDOW} (none is global attention), got {window}")
    }
    if let Some(pad) = config.pad {
        check::shape(OP, "pad", pad, &[packed])?;
        check::same_kind(OP, "pad", pad, qkv)?;
    }
    check::finite(OP, "softmax_scale", config.softmax_scale)?;
    if let Some(dropout) = config.dropout {
        dropout.validate(OP)?;
    }
    Ok((h, w))
}
