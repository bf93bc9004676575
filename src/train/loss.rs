//! The losses of mask prediction.
//!
//! ```text
//! bce(x, t)   = mean over pixels of  max(x, 0) - x t + ln(1 + exp(-|x|))
//! focal(x, t) = mean over pixels of  (0.25 t + 0.75 (1 - t)) (p + t - 2 p t)^2 bce,   p = sigmoid(x)
//! dice(x, t)  = 1 - (2 sum(p t) + 1) / (sum p + sum t + 1),   sums over one mask
//! iou(s, x, t)= (s - |x > 0 and t| / |x > 0 or t|)^2          no gradient through the true IoU
//! mask_loss   = mean over masks of  bce + dice
//! ```
//! x are logits, t targets in 0..1, s predicted IoUs. The form of bce never exponentiates a positive number; its
//! derivative is exactly sigmoid(x) - t everywhere, 0 included. Everything is computed in f32, of f64 in f64.
//!
//! Source: Kirillov et al., "Segment Anything", 2023, appendix A: focal to dice 20:1, IoU 1, the best of three masks.

use crate::ops::mask_loss::{mask_ious, mask_losses};
use crate::problem::{MaskTerms, FOCAL_ALPHA};
use crate::{Error, Result as CrateResult};
use candle_core::{bail, DType, Result, Tensor};
use serde::Serialize;
use std::fmt;
use std::str::FromStr;

/// Binary cross-entropy of logits against targets of the same shape, averaged over all elements: a scalar.
///
/// [Example](crate::train::LossWeights)
pub fn bce_with_logits(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (x, t) = checked("bce-with-logits", logits, targets)?;
    over_all_pixels(&x, &t, MaskTerms { bce: 1.0, ..NOTHING })
}

/// Focal loss of logits against targets of the same shape, averaged over all elements: a scalar. Alpha is 0.25, gamma
/// 2.
///
/// [Example](crate::train::LossWeights)
pub fn focal_loss(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    let (x, t) = checked("focal-loss", logits, targets)?;
    over_all_pixels(&x, &t, MaskTerms { focal: 1.0, ..NOTHING })
}

/// Dice loss of logits `[N, h, w]` against targets `[N, h, w]`, averaged over the masks: a scalar.
///
/// [Example](crate::train::LossWeights)
pub fn dice_loss(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    const OP: &str = "dice-loss";
    let (x, t) = checked(OP, logits, targets)?;
    if x.rank() != 3 {
        bail!("{OP}: logits must have shape [masks, height, width], got {:?}", x.dims())
    }
    of_masks(&x, &t, MaskTerms { dice: 1.0, ..NOTHING })?.mean_all()
}

/// Cross-entropy plus dice, the mean over masks `[N, h, w]`: a scalar.
///
/// [Example](crate::train)
pub fn mask_loss(logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    dice_loss(logits, targets)? + bce_with_logits(logits, targets)?
}

/// Squared error of predicted IoUs `[N]` for logits and targets `[N, h, w]`, averaged over the masks: a scalar.
///
/// [Example](crate::train::LossWeights)
pub fn iou_loss(scores: &Tensor, logits: &Tensor, targets: &Tensor) -> Result<Tensor> {
    const OP: &str = "iou-loss";
    let (x, t) = checked(OP, logits, targets)?;
    if x.rank() != 3 || scores.dims() != [x.dim(0)?] {
        bail!(
            "{OP}: scores must have shape [masks] and logits [masks, height, width], got {:?} and {:?}",
            scores.dims(),
            x.dims()
        )
    }
    let dtype = x.dtype();
    let scores = scores.to_dtype(dtype)?;
    if let Some(iou) = mask_ious(&x, &t)? {
        return (scores - iou)?.sqr()?.mean_all();
    }
    let area = |inside: &Tensor| inside.to_dtype(dtype)?.sum((1, 2));
    let (mask, truth) = (x.detach().gt(0.0)?.to_dtype(dtype)?, t.gt(0.5)?.to_dtype(dtype)?);
    let both = area(&(&mask * &truth)?)?;
    let any = ((area(&mask)? + area(&truth)?)? - &both)?;
    // Two empty masks agree.
    let neither = any.eq(0.0)?.to_dtype(dtype)?;
    let iou = ((both + &neither)? / (any + neither)?)?;
    (scores - iou)?.sqr()?.mean_all()
}

/// Weights of a loss's terms. A term of weight 0 is left out. As text: `focal=20,dice=1,iou=1`.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::train::{dice_loss, focal_loss, LossWeights};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let weights: LossWeights = "focal=20,dice=1".parse()?;
/// let targets = Tensor::new(&[[[1f32, 0.0], [0.0, 1.0]]], &Device::Cpu)?; // object, row, column
/// let logits = ((&targets - 0.5)? * 8.0)?;
/// let scores = Tensor::ones((1, 1), DType::F32, &Device::Cpu)?; // predicted IoUs, here without weight
/// let loss = weights.loss(&logits.unsqueeze(1)?, &scores, &targets)?.to_scalar::<f32>()?;
/// let terms = (focal_loss(&logits, &targets)? * 20.0)? + dice_loss(&logits, &targets)?;
/// assert!((loss - terms?.to_scalar::<f32>()?).abs() < 1e-5);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct LossWeights {
    /// Cross-entropy.
    pub bce: f64,
    /// Focal loss.
    pub focal: f64,
    /// Dice loss.
    pub dice: f64,
    /// Squared error of the predicted IoU, over all masks.
    pub iou: f64,
    /// All of these terms once more, of the alternatives for a first prompt: the best mask alone learns its shape.
    pub multimask: f64,
}

impl LossWeights {
    /// Only zeros.
    const NONE: Self = Self { bce: 0.0, focal: 0.0, dice: 0.0, iou: 0.0, multimask: 0.0 };
    /// [`mask_loss`] of the single mask.
    pub const MASK: Self = Self { bce: 1.0, dice: 1.0, ..Self::NONE };
    /// SAM's own.
    pub const SAM: Self = Self { focal: 20.0, dice: 1.0, iou: 1.0, multimask: 1.0, ..Self::NONE };

    fn named(&mut self) -> [(&'static str, &mut f64); 5] {
        let Self { bce, focal, dice, iou, multimask } = self;
        [("bce", bce), ("focal", focal), ("dice", dice), ("iou", iou), ("multimask", multimask)]
    }

    /// Refuses weights that are negative or not finite, and a loss without a term for the masks' shape.
    ///
    /// # Errors
    /// As said.
    pub fn validate(&self) -> CrateResult<()> {
        let mut weights = *self;
        for (name, weight) in weights.named() {
            if !(weight.is_finite() && *weight >= 0.0) {
                let message = format!("the loss's weight {name} must be at least 0, got {weight}");
                return Err(Error::config(message));
            }
        }
        if self.bce + self.focal + self.dice == 0.0 {
            return Err(Error::config("a loss needs one of bce, focal and dice"));
        }
        Ok(())
    }

    /// The loss of M masks for each of N objects, a scalar. It is the mean over objects of the best mask's loss, and
    /// over all masks of the IoU term. Logits are `[N, M, h, w]`, predicted IoUs `[N, M]`, targets `[N, h, w]`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn loss(&self, logits: &Tensor, scores: &Tensor, targets: &Tensor) -> Result<Tensor> {
        const OP: &str = "loss";
        let (objects, masks, h, w) = logits.dims4()?;
        if masks == 0 || targets.dims() != [objects, h, w] || scores.dims() != [objects, masks] {
            bail!(
                "{OP}: logits [N, M, h, w] need scores [N, M] and targets [N, h, w], got {:?}, {:?} and {:?}",
                logits.dims(),
                scores.dims(),
                targets.dims()
            )
        }
        let logits = logits.reshape((objects * masks, h, w))?;
        let targets = match masks {
            1 => targets.clone(),
            _ => targets.unsqueeze(1)?.repeat((1, masks, 1, 1))?.reshape(logits.shape())?,
        };
        let (x, t) = checked(OP, &logits, &targets)?;
        let mut sum = Sum(None);
        let terms = MaskTerms { bce: self.bce, focal: self.focal, dice: self.dice };
        if terms.bce + terms.focal + terms.dice > 0.0 {
            let each = of_masks(&x, &t, terms)?;
            let best = match masks {
                // One mask needs no choice.
                1 => each.mean_all()?,
                _ => {
                    let each = each.reshape((objects, masks))?;
                    let best = each.detach().argmin_keepdim(1)?;
                    each.gather(&best, 1)?.mean_all()?
                }
            };
            sum.add(best, 1.0)?;
        }
        if self.iou > 0.0 {
            sum.add(iou_loss(&scores.flatten_all()?, &x, &t)?, self.iou)?;
        }
        match sum.0 {
            Some(loss) => Ok(loss),
            None => bail!("{OP}: all weights are 0"),
        }
    }
}

/// [`LossWeights::MASK`].
impl Default for LossWeights {
    fn default() -> Self {
        Self::MASK
    }
}

impl FromStr for LossWeights {
    type Err = String;

    fn from_str(text: &str) -> std::result::Result<Self, String> {
        let (mut weights, mut seen) = (Self::NONE, vec![]);
        for part in text.split(',') {
            let wrong = || format!("expected TERM=WEIGHT, got {part:?}");
            let (name, weight) = part.trim().split_once('=').ok_or_else(wrong)?;
            let weight: f64 = weight.trim().parse().map_err(|_| wrong())?;
            let mut known = weights.named();
            let names = known.each_ref().map(|(name, _)| *name).join(", ");
            match known.iter_mut().find(|(known, _)| *known == name.trim()) {
                Some((name, _)) if seen.contains(name) => {
                    return Err(format!("{name} is there twice"))
                }
                Some((name, place)) => {
                    seen.push(*name);
                    **place = weight;
                }
                None => return Err(format!("no term {name:?}; there are {names}")),
            }
        }
        weights.validate().map_err(|e| e.to_string())?;
        Ok(weights)
    }
}

impl fmt::Display for LossWeights {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut weights = *self;
        let used = weights.named().into_iter().filter(|(_, weight)| **weight != 0.0);
        let used: Vec<String> = used.map(|(name, weight)| format!("{name}={weight}")).collect();
        f.write_str(&used.join(","))
    }
}

/// A weighted sum of some terms.
struct Sum(Option<Tensor>);

impl Sum {
    fn add(&mut self, term: Tensor, weight: f64) -> Result<()> {
        let term = if weight == 1.0 { term } else { (term * weight)? };
        self.0 = Some(match self.0.take() {
            Some(sum) => (sum + term)?,
            None => term,
        });
        Ok(())
    }
}

const NOTHING: MaskTerms = MaskTerms { bce: 0.0, focal: 0.0, dice: 0.0 };

/// As [`of_masks`], of all pixels as those of one mask: a scalar.
fn over_all_pixels(x: &Tensor, t: &Tensor, terms: MaskTerms) -> Result<Tensor> {
    let one = (1, x.elem_count(), 1);
    of_masks(&x.reshape(one)?, &t.reshape(one)?, terms)?.squeeze(0)
}

/// The weighted sum of the terms for each mask, `[N, h, w] -> [N]`.
fn of_masks(x: &Tensor, t: &Tensor, terms: MaskTerms) -> Result<Tensor> {
    if let Some(losses) = mask_losses(x, t, terms)? {
        return Ok(losses);
    }
    let mut sum = Sum(None);
    if terms.dice > 0.0 {
        sum.add(dice_masks(x, t)?, terms.dice)?;
    }
    if terms.bce > 0.0 {
        sum.add(bce_pixels(x, t)?.mean((1, 2))?, terms.bce)?;
    }
    if terms.focal > 0.0 {
        sum.add(focal_pixels(x, t)?.mean((1, 2))?, terms.focal)?;
    }
    match sum.0 {
        Some(losses) => Ok(losses),
        None => x.zeros_like()?.mean((1, 2)),
    }
}

fn bce_pixels(x: &Tensor, t: &Tensor) -> Result<Tensor> {
    let softplus = (x.abs()?.neg()?.exp()? + 1.0)?.log()?;
    (x.relu()? - (x * t)?)? + softplus
}

fn focal_pixels(x: &Tensor, t: &Tensor) -> Result<Tensor> {
    let p = candle_nn::ops::sigmoid(x)?;
    let miss = ((&p + t)? - ((&p * t)? * 2.0)?)?;
    let alpha = f64::from(FOCAL_ALPHA);
    let alpha = t.affine(2.0 * alpha - 1.0, 1.0 - alpha)?;
    (alpha * miss.sqr()?)? * bce_pixels(x, t)?
}

/// `[N, h, w] -> [N]`
fn dice_masks(x: &Tensor, t: &Tensor) -> Result<Tensor> {
    let p = candle_nn::ops::sigmoid(x)?;
    let overlap = (&p * t)?.sum((1, 2))?;
    let total = (p.sum((1, 2))? + t.sum((1, 2))?)?;
    let dice = ((overlap * 2.0)? + 1.0)?.div(&(total + 1.0)?)?;
    1.0 - dice
}

/// Logits and targets in f32, or in the f64 of the logits, of the same, not empty, shape.
fn checked(op: &str, logits: &Tensor, targets: &Tensor) -> Result<(Tensor, Tensor)> {
    if logits.dims() != targets.dims() || logits.elem_count() == 0 {
        bail!(
            "{op}: logits and targets must have equal shapes without a zero, got {:?} and {:?}",
            logits.dims(),
            targets.dims()
        )
    }
    let dtype = if logits.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    Ok((logits.to_dtype(dtype)?, targets.to_dtype(dtype)?))
}
