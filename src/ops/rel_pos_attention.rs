//! Attention with decomposed relative positions, as SAM's image encoder has it, global or in windows, by a given
//! engine.
//!
//! ```text
//! S[n, m] = softmax_scale q_n . k_m + rel_h[n, h_m] + rel_w[n, w_m]            O = dropout(softmax(S)) V
//! rel_h[n, kh] = q_n . Rh[h_n - kh + K_h - 1]      rel_w[n, kw] = q_n . Rw[w_n - kw + K_w - 1]     (unscaled q)
//! ```
//! Input and output are whole grids, `[B, H, W, ..]`. Windows are a matter of addressing. Where the last window of a
//! row or column hangs over the grid, the keys and values outside are the `pad` vector. SAM pads with zeros *before*
//! the projection, so `pad` is its bias. These keys take part in the softmax, and their queries do not exist.
//!
//! Source: `segment_anything/modeling/image_encoder.py`.

use super::arguments::RelPosAttention;
use super::check::Outline;
use super::cpu::{Chain, Layer, Residual};
use super::custom::Engine;
use super::{composed, fallback, resize_linear};
#[cfg(feature = "cuda")]
use super::{computed, custom::operand, gpu::rel_pos_attention::Attention, params};
#[cfg(feature = "cuda")]
use crate::launch::Gpu;
use crate::problem::AttentionProblem;
#[cfg(feature = "cuda")]
use candle_core::bail;
use candle_core::{Result, Tensor};
use std::sync::Once;

const OP: &str = AttentionProblem::OP;
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

/// Attention by one engine, for the self-test and measurements.
///
/// # Errors
/// - an argument does not fit;
/// - no kernel covers the problem.
#[cfg(feature = "cuda")]
pub(super) fn by(qkv: &Tensor, config: &RelPosAttention<'_>, engine: Engine) -> Result<Tensor> {
    run(qkv, config, prepare(qkv, config)?, engine)
}

/// Attention by one engine.
pub(super) fn run(
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
            fallback::tell(OP, qkv, fallback::NO_KERNEL);
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

/// Attention as a GPU's kernels compute it, where tables and pad are frozen; with it the pad.
#[cfg(feature = "cuda")]
pub(super) fn of_gpu(
    (problem, tables, pad): Prepared<'_>,
    gpu: Gpu,
) -> Result<(Attention, Option<Tensor>)> {
    let read = |tables: [Tensor; 2]| match params::in_place(&tables, Tensor::dtype)? {
        Some(tables) => Ok(tables.try_into().ok()),
        None => bail!("{OP}: tables that are trained are no layer of a chain"),
    };
    let tables = tables.map(read).transpose()?.flatten();
    let pad = pad.map(operand).transpose()?;
    Ok((Attention { problem, tables, pad: pad.is_some(), gpu }, pad))
}

#[cfg(feature = "cuda")]
fn on_gpu(qkv: &Tensor, (problem, tables, pad): Prepared<'_>, gpu: Gpu) -> Result<Tensor> {
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
    let attention = Attention { problem, tables: frozen, pad: pad.is_some(), gpu };
    let [second, third] = [&input, &pad].map(|input| input.as_ref().unwrap_or(&qkv));
    let (out, shape, lse) = attention.forward([&qkv, second, third])?;
    let out = (candle_core::Storage::Cuda(out), shape);
    computed::node(OP, inputs, out, move |inputs, value, grad| {
        attention.backward(inputs, (value, &lse), grad)
    })
}

/// Tables of the lengths that a problem wants.
type Tables = Option<[Tensor; 2]>;

/// The problem, its tables, and the pad where padding takes part.
type Prepared<'a> = (AttentionProblem, Tables, Option<&'a Tensor>);

/// Checks everything and describes the problem.
pub(super) fn prepare<'a, 'x>(
    qkv: impl Into<Outline<'x>>,
    config: &RelPosAttention<'a>,
) -> Result<Prepared<'a>> {
    let [batch, h, w, packed] = config.validate(qkv)?;
    let (side_h, side_w) = config.window.map_or((h, w), |window| (window, window));
    let tables = match config.rel_pos {
        None => None,
        Some((rel_pos_h, rel_pos_w)) => Some([
            resize_linear(rel_pos_h, 2 * side_h - 1)?,
            resize_linear(rel_pos_w, 2 * side_w - 1)?,
        ]),
    };
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
