//! Checks shared by the operations; every message names the operation, what it expected and what it got.

use crate::cpu::int8;
use candle_core::{bail, DType, Device, Result, Tensor};

/// Shape, dtype and device of a tensor that need not be computed yet.
#[derive(Clone, Copy)]
pub(super) struct Outline<'a> {
    pub dims: &'a [usize],
    pub dtype: DType,
    pub device: &'a Device,
}

impl<'a> From<&'a Tensor> for Outline<'a> {
    fn from(tensor: &'a Tensor) -> Self {
        Self { dims: tensor.dims(), dtype: tensor.dtype(), device: tensor.device() }
    }
}

impl Outline<'_> {
    /// Length of the last dimension, 1 without any.
    pub fn width(&self) -> usize {
        self.dims.last().copied().unwrap_or(1)
    }
}

/// The dtype is one the operations take.
pub(super) fn float<'a>(
    op: &'static str,
    name: &str,
    tensor: impl Into<Outline<'a>>,
) -> Result<()> {
    match tensor.into().dtype {
        DType::F32 | DType::F16 | DType::BF16 => Ok(()),
        dtype => bail!("{op}: {name} must be f32, f16 or bf16, got {dtype:?}"),
    }
}

/// `tensor` lives on the device of `like`.
pub(super) fn same_device<'a>(
    op: &'static str,
    name: &str,
    tensor: &Tensor,
    like: impl Into<Outline<'a>>,
) -> Result<()> {
    let like = like.into();
    if !tensor.device().same_device(like.device) {
        bail!(
            "{op}: {name} is on {:?}, expected {:?}",
            tensor.device().location(),
            like.device.location()
        )
    }
    Ok(())
}

/// `tensor` has the dtype of `like` and lives on its device.
pub(super) fn same_kind<'a>(
    op: &'static str,
    name: &str,
    tensor: &Tensor,
    like: impl Into<Outline<'a>>,
) -> Result<()> {
    let like = like.into();
    same_device(op, name, tensor, like)?;
    if tensor.dtype() != like.dtype {
        bail!("{op}: {name} is {:?}, expected {:?}", tensor.dtype(), like.dtype)
    }
    Ok(())
}

/// `tensor` lives on the device of `like`, and is f32 or has the dtype of `like`.
pub(super) fn parameter<'a>(
    op: &'static str,
    name: &str,
    tensor: &Tensor,
    like: impl Into<Outline<'a>>,
) -> Result<()> {
    let like = like.into();
    match tensor.dtype() {
        DType::F32 => same_device(op, name, tensor, like),
        _ => same_kind(op, name, tensor, like),
    }
}

/// `weight` is one in int8 with a scale for each row, and `like` is on the CPU, too.
pub(super) fn int8_weight(
    op: &'static str,
    weight: &Tensor,
    scales: &Tensor,
    like: Outline<'_>,
) -> Result<()> {
    if weight.dtype() != DType::U8 || scales.dtype() != DType::F32 {
        let (weight, scales) = (weight.dtype(), scales.dtype());
        bail!("{op}: an int8 weight is u8 with scales in f32, got {weight:?} and {scales:?}")
    }
    if !like.device.is_cpu() {
        bail!("{op}: int8 weights are for the CPU, x is on {:?}", like.device.location())
    }
    same_device(op, "weight", weight, like)?;
    same_device(op, "scales", scales, like)?;
    shape(op, "scales", scales, &weight.dims()[..1])?;
    let depth = weight.dims().get(1).copied().unwrap_or(0);
    if depth % 4 != 0 || depth > int8::MAX_DEPTH {
        let most = int8::MAX_DEPTH;
        bail!("{op}: an int8 weight's rows are multiples of 4 up to {most} long, got {depth}")
    }
    Ok(())
}

/// `tensor` has exactly the shape `expected`.
pub(super) fn shape(
    op: &'static str,
    name: &str,
    tensor: &Tensor,
    expected: &[usize],
) -> Result<()> {
    if tensor.dims() != expected {
        bail!("{op}: {name} must have shape {expected:?}, got {:?}", tensor.dims())
    }
    Ok(())
}

/// No dimension of `tensor` is zero, and it has at least one.
pub(super) fn not_empty<'a>(
    op: &'static str,
    name: &str,
    tensor: impl Into<Outline<'a>>,
) -> Result<()> {
    let dims = tensor.into().dims;
    if dims.is_empty() || dims.contains(&0) {
        bail!("{op}: {name} must not be empty, got shape {dims:?}")
    }
    Ok(())
}

/// `value` is a finite number, in the f32 that the operations compute with too.
pub(super) fn finite(op: &'static str, name: &str, value: f64) -> Result<()> {
    if !(value as f32).is_finite() {
        bail!("{op}: {name} must be finite in f32, got {value}")
    }
    Ok(())
}
