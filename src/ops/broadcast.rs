//! A small tensor applied to all of a large one, with a gradient that is summed in f32.
//!
//! ```text
//! scale_shift   y = x * scale + shift      dx = dy * scale     dscale = sum dy * x     dshift = sum dy
//! repeat        y = t, as often as asked   dt = sum dy
//! ```
//! candle's `broadcast_mul`, `broadcast_add` and `broadcast_as` take these sums in the storage's dtype: in bf16 a sum
//! of ones ends at 256. Here products and sums are f32, and each result is rounded once. `scale` and `shift` may be f32
//! beside an `x` in 16 bits.

use super::check;
use super::computed::with_backward;
use super::custom::{from_f32, vec_f32, with_f32};
use crate::cpu::broadcast::{self, Spread};
use candle_core::op::BackpropOp;
use candle_core::{bail, DType, Device, Result, Shape, Storage, Tensor};

/// `x * scale + shift` in the dtype of `x`; both broadcast to the shape of `x`.
///
/// [Example](crate::ops::broadcast_add)
///
/// # Errors
/// - `x` is empty;
/// - `x`, `scale` or `shift` is not f32, f16 or bf16;
/// - the tensors are on several devices;
/// - `scale` or `shift` does not broadcast to the shape of `x`.
pub fn scale_shift(x: &Tensor, scale: Option<&Tensor>, shift: Option<&Tensor>) -> Result<Tensor> {
    const OP: &str = "scale-shift";
    check::float(OP, "x", x)?;
    check::not_empty(OP, "x", x)?;
    for (name, tensor) in [("scale", scale), ("shift", shift)] {
        let Some(tensor) = tensor else { continue };
        check::float(OP, name, tensor)?;
        check::same_device(OP, name, tensor, x)?;
        spread(OP, x.dims(), tensor)?;
    }
    let value = scaled_and_shifted(x, scale, shift)?;
    let (has_scale, has_shift) = (scale.is_some(), shift.is_some());
    with_backward(OP, (x, scale, shift), value, move |[x, scale, shift], grad| {
        let dx = match (x.track_op(), has_scale) {
            (false, _) => None,
            (true, false) => Some(grad.clone()),
            (true, true) => Some(scaled_and_shifted(grad, Some(scale), None)?),
        };
        let scale = (has_scale && scale.track_op()).then_some(scale);
        let shift = (has_shift && shift.track_op()).then_some(shift);
        Ok((
            dx,
            scale.map(|scale| sum_to(OP, grad, Some(x), scale)).transpose()?,
            shift.map(|shift| sum_to(OP, grad, None, shift)).transpose()?,
        ))
    })
}

/// `x + shift`, which broadcasts to the shape of `x`.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_sam_lora::ops::{broadcast_add, repeat, scale_shift};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let shift = Var::ones(1, DType::BF16, &Device::Cpu)?;
/// let y = broadcast_add(&Tensor::zeros((1000, 1), DType::BF16, &Device::Cpu)?, &shift)?.to_dtype(DType::F32)?;
/// assert_eq!(y.to_vec2::<f32>()?, repeat(&shift, (1000, 1))?.to_dtype(DType::F32)?.to_vec2::<f32>()?);
/// let gradients = y.sum_all()?.backward()?;
/// let gradient = gradients.get(&shift).unwrap().to_dtype(DType::F32)?.to_vec1::<f32>()?;
/// assert_eq!(gradient, [1000.0]); // a sum in bf16 ends at 256
/// let row = Tensor::new(&[1f32, 2.0], &Device::Cpu)?;
/// assert_eq!(scale_shift(&row, Some(&row), Some(&row))?.to_vec1::<f32>()?, [2.0, 6.0]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// As [`scale_shift`].
pub fn broadcast_add(x: &Tensor, shift: &Tensor) -> Result<Tensor> {
    scale_shift(x, None, Some(shift))
}

/// `t` as often as `shape` asks for, as candle's `broadcast_as`, but in memory of its own.
///
/// [Example](crate::ops::broadcast_add)
///
/// # Errors
/// - `t` or `shape` is empty;
/// - `t` is not f32, f16 or bf16;
/// - `t` does not broadcast to `shape`.
pub fn repeat(t: &Tensor, shape: impl Into<Shape>) -> Result<Tensor> {
    const OP: &str = "repeat";
    check::float(OP, "t", t)?;
    let shape = shape.into();
    spread(OP, shape.dims(), t)?;
    let value = t.detach().broadcast_as(shape)?.contiguous()?;
    check::not_empty(OP, "the shape", &value)?;
    with_backward(OP, (t, None, None), value, |[t, ..], grad| {
        Ok((Some(sum_to(OP, grad, None, t)?), None, None))
    })
}

fn spread(op: &'static str, large: &[usize], small: &Tensor) -> Result<Spread> {
    match Spread::new(large, small.dims()) {
        Some(spread) => Ok(spread),
        None => bail!("{op}: {:?} does not broadcast to {large:?}", small.dims()),
    }
}

/// The value of [`scale_shift`], without a gradient.
fn scaled_and_shifted(
    x: &Tensor,
    scale: Option<&Tensor>,
    shift: Option<&Tensor>,
) -> Result<Tensor> {
    const OP: &str = "scale-shift";
    if x.device().is_cpu() {
        let mut y = vec_f32(OP, x)?;
        if let Some(scale) = scale {
            let (spread, scale) = (spread(OP, x.dims(), scale)?, vec_f32(OP, scale)?);
            broadcast::apply(&mut y, &scale, &spread, |y, scale| *y *= scale);
        }
        if let Some(shift) = shift {
            let (spread, shift) = (spread(OP, x.dims(), shift)?, vec_f32(OP, shift)?);
            broadcast::apply(&mut y, &shift, &spread, |y, shift| *y += shift);
        }
        let storage = Storage::Cpu(from_f32(OP, y, x.dtype())?);
        return Ok(Tensor::from_storage(storage, x.shape(), BackpropOp::none(), false));
    }
    if let (None, Some(shift)) = (scale, shift.filter(|shift| shift.dtype() == x.dtype())) {
        return x.detach().broadcast_add(&shift.detach());
    }
    let wide = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
    let mut y = wide(x)?;
    if let Some(scale) = scale {
        y = y.broadcast_mul(&wide(scale)?)?;
    }
    if let Some(shift) = shift {
        y = y.broadcast_add(&wide(shift)?)?;
    }
    y.to_dtype(x.dtype())
}

/// The sums of `values`, or of `values * factors`, for each element of `like`, in its shape and dtype.
fn sum_to(
    op: &'static str,
    values: &Tensor,
    factors: Option<&Tensor>,
    like: &Tensor,
) -> Result<Tensor> {
    let spread = spread(op, values.dims(), like)?;
    let sums = match values.device() {
        Device::Cpu => {
            let sums = with_f32(op, values, |values| match factors {
                Some(factors) => with_f32(op, factors, |factors| {
                    Ok(broadcast::sums(&values, Some(&factors), &spread))
                }),
                None => Ok(broadcast::sums(&values, None, &spread)),
            })?;
            Tensor::from_vec(sums, like.shape(), like.device())?
        }
        _ => {
            let mut terms = values.to_dtype(DType::F32)?;
            if let Some(factors) = factors {
                terms = (terms * factors.detach().to_dtype(DType::F32)?)?;
            }
            let missing = values.rank() - like.rank();
            let is_constant = |axis: &usize| *axis < missing || like.dims()[axis - missing] == 1;
            let axes: Vec<_> = (0..values.rank()).filter(is_constant).collect();
            terms.sum_keepdim(axes)?.reshape(like.shape())?
        }
    };
    sums.to_dtype(like.dtype())
}
