//! The losses of mask prediction in one operation, where the CPU's code has them.

use super::computed::with_backward;
use super::custom::with_f32;
use crate::cpu::mask_loss;
use crate::problem::MaskTerms;
use candle_core::{DType, Result, Tensor};

const OP: &str = "mask-loss";

/// Whether the CPU's code computes a loss of `x` against `t`: logits in f32, no gradient for targets.
fn covers(x: &Tensor, t: &Tensor) -> bool {
    x.device().is_cpu() && x.dtype() == DType::F32 && !t.track_op()
}

/// The weighted sum of the terms for each mask, `[N, ..]` and `[N, ..] -> [N]`, with a gradient for `x`; none where
/// candle's operations have to compute it.
pub(crate) fn mask_losses(x: &Tensor, t: &Tensor, terms: MaskTerms) -> Result<Option<Tensor>> {
    if !covers(x, t) {
        return Ok(None);
    }
    let masks = x.dim(0)?;
    let pixels = x.elem_count() / masks;
    let sums = with_both(x, t, |x, t| Ok(mask_loss::sums(x, t, pixels)))?;
    let losses: Vec<f32> = sums.iter().map(|sums| mask_loss::loss(terms, sums, pixels)).collect();
    let losses = Tensor::from_vec(losses, masks, x.device())?;
    let loss =
        with_backward(OP, (x, Some(t), None), losses, move |[x, t, _], grad| {
            let grad = grad.to_vec1::<f32>()?;
            let dx = with_both(x, t, |x, t| {
                Ok(mask_loss::gradient(terms, (x, t), &sums, &grad).into_vec())
            })?;
            Ok((Some(Tensor::from_vec(dx, x.shape(), x.device())?), None, None))
        })?;
    Ok(Some(loss))
}

/// Intersection over union of `x > 0` and `t > 1/2` for each mask, `[N]`, without a gradient; none as above.
pub(crate) fn mask_ious(x: &Tensor, t: &Tensor) -> Result<Option<Tensor>> {
    if !covers(x, t) {
        return Ok(None);
    }
    let masks = x.dim(0)?;
    let pixels = x.elem_count() / masks;
    let ious = with_both(x, t, |x, t| Ok(mask_loss::ious(x, t, pixels)))?;
    Ok(Some(Tensor::from_vec(ious, masks, x.device())?))
}

fn with_both<R>(x: &Tensor, t: &Tensor, f: impl FnOnce(&[f32], &[f32]) -> Result<R>) -> Result<R> {
    with_f32(OP, x, |x| with_f32(OP, t, |t| f(&x, &t)))
}
