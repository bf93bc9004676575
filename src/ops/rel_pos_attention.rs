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

use super::custom::{
    dtype_of, from_f32, implementation, operand, shared_memory, tensor_like, to_f32, vec_f32,
    with_f32,
};
use super::{check, composed, resize_linear, Gradients};
use crate::cpu::attention;
use crate::launch::family::{Family, Implementation};
use crate::launch::rel_pos_attention as kernels;
use crate::philox::Dropout;
use crate::problem::AttentionProblem;
use candle_core::{bail, CpuStorage, CustomOp3, Device, Layout, Result, Shape, Tensor};
use std::borrow::Cow;
use std::sync::OnceLock;

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
/// N x N is allocated. Elsewhere the graph of [`composed`] runs, which holds the weights.
///
/// # Errors
/// On shapes that do not fit, mixed dtypes or devices, a window of 0, non-finite scale, impossible dropout.
pub fn rel_pos_attention(qkv: &Tensor, config: &RelPosAttention<'_>) -> Result<Tensor> {
    let (problem, tables, pad) = prepare(qkv, config)?;
    let config = RelPosAttention { rel_pos: tables.as_ref().map(|[h, w]| (h, w)), pad, ..*config };
    let covered = || {
        let needed = kernels::shared_bytes(&problem, qkv.dtype());
        needed.is_some_and(|needed| needed <= shared_memory(qkv.device()))
    };
    let family = |_| Family::of_attention(&problem, qkv.dtype());
    match implementation(qkv.device(), qkv.dtype(), covered, family)? {
        Some(whose) => apply(qkv, problem, &tables, pad, whose),
        None => Ok(composed::rel_pos_attention(qkv, &config)?.0),
    }
}

/// [`rel_pos_attention`] by the kernels of one implementation, for the self-test.
///
/// # Errors
/// As [`rel_pos_attention`], and on problems that no kernel covers.
#[cfg(feature = "cuda")]
pub(super) fn by_kernels(
    qkv: &Tensor,
    config: &RelPosAttention<'_>,
    whose: Implementation,
) -> Result<Tensor> {
    let (problem, tables, pad) = prepare(qkv, config)?;
    apply(qkv, problem, &tables, pad, whose)
}

/// Applies the operation.
fn apply(
    qkv: &Tensor,
    problem: AttentionProblem,
    tables: &Tables,
    pad: Option<&Tensor>,
    implementation: Implementation,
) -> Result<Tensor> {
    let qkv = operand(qkv)?;
    // In the place of an input that is not there: nobody reads it.
    let absent = qkv.detach();
    let separate = match qkv.device() {
        Device::Cpu => None,
        _ => where_they_lie(tables)?,
    };
    let tables = match (tables, &separate) {
        (Some(tables), None) => operand(&Tensor::cat(tables, 0)?)?,
        _ => absent.clone(),
    };
    let saved = OnceLock::new();
    let op = FusedAttention { problem, separate, pad: pad.is_some(), implementation, saved };
    qkv.apply_op3(&tables, &pad.map_or(Ok(absent), operand)?, op)
}

/// Tables of the lengths that a problem wants.
type Tables = Option<[Tensor; 2]>;

/// The tables as kernels read them; none if there are none, or one of them wants a gradient.
fn where_they_lie(tables: &Tables) -> Result<Tables> {
    match tables {
        Some([h, w]) if !h.track_op() && !w.track_op() => Ok(Some([operand(h)?, operand(w)?])),
        _ => Ok(None),
    }
}

/// Checks everything; the problem, its tables, and the pad where padding takes part.
pub(super) fn prepare<'a>(
    qkv: &Tensor,
    config: &RelPosAttention<'a>,
) -> Result<(AttentionProblem, Tables, Option<&'a Tensor>)> {
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

/// Inputs: qkv, both tables in one tensor, pad; placeholders for what is absent.
struct FusedAttention {
    problem: AttentionProblem,
    /// The tables, if they are no input: frozen ones, for kernels, which read them where they lie.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    separate: Option<[Tensor; 2]>,
    pad: bool,
    /// The kernels that compute it on a GPU.
    #[cfg_attr(not(feature = "cuda"), allow(dead_code))]
    implementation: Implementation,
    saved: OnceLock<Saved>,
}

/// The normalizers of the softmax's rows, on the device that computed them.
enum Saved {
    Cpu(Vec<attention::Normalizer>),
    #[cfg(feature = "cuda")]
    Gpu(Tensor),
}

#[cfg(feature = "cuda")]
impl FusedAttention {
    fn on_gpu(&self) -> super::gpu::rel_pos_attention::Attention<'_> {
        let &Self { ref problem, ref separate, pad, implementation, .. } = self;
        let tables = separate.as_ref();
        super::gpu::rel_pos_attention::Attention { problem, tables, pad, implementation }
    }
}

impl CustomOp3 for FusedAttention {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        qkv: &CpuStorage,
        qkv_layout: &Layout,
        tables: &CpuStorage,
        tables_layout: &Layout,
        pad: &CpuStorage,
        pad_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let p = &self.problem;
        let values = to_f32(OP, qkv, qkv_layout)?;
        let present = |present, storage, layout| match present {
            true => to_f32(OP, storage, layout),
            false => Ok(Cow::Borrowed(&[][..])),
        };
        let tables = present(p.rel_pos, tables, tables_layout)?;
        let pad = present(self.pad, pad, pad_layout)?;
        let inputs = attention::Inputs { qkv: &values, tables: &tables, pad: &pad };
        let (out, normalizers) = attention::forward(p, &inputs);
        // The operation runs once; a second value could only be equal.
        let _ = self.saved.set(Saved::Cpu(normalizers));
        let shape = Shape::from((p.batch, p.h, p.w, p.channels()));
        Ok((from_f32(OP, out.into_vec(), dtype_of(qkv))?, shape))
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        qkv: &candle_core::CudaStorage,
        qkv_layout: &Layout,
        tables: &candle_core::CudaStorage,
        tables_layout: &Layout,
        pad: &candle_core::CudaStorage,
        pad_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        let inputs = [(qkv, qkv_layout), (tables, tables_layout), (pad, pad_layout)];
        let (out, shape, lse) = self.on_gpu().forward(inputs)?;
        let _ = self.saved.set(Saved::Gpu(lse));
        Ok((out, shape))
    }

    fn bwd(
        &self,
        qkv: &Tensor,
        tables: &Tensor,
        pad: &Tensor,
        res: &Tensor,
        grad_res: &Tensor,
    ) -> Result<Gradients> {
        let normalizers = match self.saved.get() {
            Some(Saved::Cpu(normalizers)) => normalizers,
            #[cfg(feature = "cuda")]
            Some(Saved::Gpu(lse)) => {
                return self.on_gpu().backward([qkv, tables, pad], (res, lse), grad_res);
            }
            None => bail!("{OP}: backward without a forward"),
        };
        let table_values = if self.problem.rel_pos { vec_f32(OP, tables)? } else { Vec::new() };
        let pad_values = if self.pad { vec_f32(OP, pad)? } else { Vec::new() };
        let grads = with_f32(OP, qkv, |qkv| {
            let inputs = attention::Inputs { qkv: &qkv, tables: &table_values, pad: &pad_values };
            with_f32(OP, res, |out| {
                with_f32(OP, grad_res, |grad| {
                    Ok(attention::backward(&self.problem, &inputs, &out, normalizers, &grad))
                })
            })
        })?;
        let wanted = |present: bool, values, like: &Tensor| {
            (present && like.track_op()).then(|| tensor_like(values, like)).transpose()
        };
        Ok((
            wanted(true, grads.qkv.into_vec(), qkv)?,
            wanted(self.problem.rel_pos, grads.tables, tables)?,
            wanted(self.pad, grads.pad, pad)?,
        ))
    }
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

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{DType, Var};

    #[test]
    fn kernels_read_frozen_tables_where_they_lie() -> Result<()> {
        let table = || Tensor::zeros((27, 64), DType::BF16, &Device::Cpu);
        let (h, w) = (table()?, table()?);
        let lie = where_they_lie(&Some([h.clone(), w.clone()]))?;
        assert_eq!(lie.map(|tables| tables.map(|t| t.id())), Some([h.id(), w.id()]));

        // What is trained is one input, for the gradient.
        let trained = Var::from_tensor(&w)?;
        assert!(where_they_lie(&Some([h, trained.as_tensor().clone()]))?.is_none());
        Ok(())
    }
}
