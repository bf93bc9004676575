//! The losses of mask prediction.
//!
//! ```text
//! bce(x, t)  = mean over pixels of  max(x, 0) - x t + ln(1 + exp(-|x|))
//! dice(x, t) = 1 - (2 sum(p t) + 1) / (sum p + sum t + 1),   p = sigmoid(x), sums over one mask
//! mask_loss  = mean over masks of  bce + dice
//! ```
//! x are logits, t targets in 0..1. The form of bce never exponentiates a positive number; its derivative is
//! exactly sigmoid(x) - t everywhere, 0 included. Everything is computed in f32.

use candle_core::{bail, DType, Result, Tensor};

/// Binary cross-entropy of logits against targets of the same shape, averaged over all elements: a scalar.
pub fn bce_with_logits(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (x, t) = checked("bce-with-logits", logits, targets)?;
    let softplus = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    ((x.relu()? - (&x * t)?)? + softplus)?.mean_all()
}

/// Dice loss of logits `[N, h, w]` against targets `[N, h, w]`, averaged over the masks: a scalar.
pub fn dice_loss(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    const OP: &str = "dice-loss";
    let (x, t) = checked(OP, logits, targets)?;
    if x.rank() != 3 {
        bail!("{OP}: logits must have shape [masks, height, width], got {:?}", x.dims())
    }
    let p = candle_nn::ops::sigmoid(&x)?;
    let overlap = (&p * &t)?.sum((1, 2))?;
    let total = (p.sum((1, 2))? + t.sum((1, 2))?)?;
    let dice = ((overlap * 2.0)? + 1.0)?.div(&(total + 1.0)?)?;
    (1.0 - dice)?.mean_all()
}

/// Cross-entropy plus dice, the mean over masks `[N, h, w]`: a scalar.
pub fn mask_loss(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    dice_loss(logits, targets)? + bce_with_logits(logits, targets)?
}

/// Logits and targets in f32, of the same, not empty, shape.
fn checked(op: &str, logits: &Tensor, targets: &Tensor) -> Result<(Tensor, Tensor)> {
    if logits.dims() != targets.dims() || logits.elem_count() == 0 {
        bail!(
            "{op}: logits and targets must have equal shapes without a zero, got {:?} and {:?}",
            logits.dims(),
            targets.dims()
        )
    }
    Ok((logits.to_dtype(DType::F32)?, targets.to_dtype(DType::F32)?))
}
