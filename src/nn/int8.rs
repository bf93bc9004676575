//! Frozen weights of linear layers in int8: a quarter of f32's memory, and products at twice bf16's rate.
//!
//! ```text
//! weight [out, in] of u8, weight_scale [out] of f32        W = weight_scale (weight - 128)
//! ```
//! The integers are symmetric about zero, -127 to 127, with a scale for each output. Activations become int8 inside the
//! product, token by token, with the scale that the token's largest magnitude asks for. Bias, adapters, activation and
//! residual follow in f32. The gradient of the input is that of W.

use super::{Layer, LayerMut, ModuleTree, Node, NodeMut};
use crate::cpu::int8::{quantize_weight, MAX_DEPTH};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use rayon::prelude::*;
use std::collections::BTreeMap;
use std::fmt;

/// The layers that [`quantize_int8`] changed, and those that it left.
///
/// [Example](crate::nn::quantize_int8)
#[derive(Clone, Debug, Default)]
pub struct Quantized {
    /// Layers that have a weight in int8 now.
    pub layers: usize,
    /// Bytes of their weights before.
    pub before: usize,
    /// Bytes of their weights and scales now.
    pub after: usize,
    /// Linear layers that stayed as they are, each with the reason.
    pub left: Vec<(String, &'static str)>,
}

impl fmt::Display for Quantized {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { layers, before, after, left } = self;
        let [before, after] = [before, after].map(|&bytes| bytes as f64 / 1e6);
        write!(f, "int8: {layers} linear layers, {before:.1} MB of weights became {after:.1} MB")?;
        match left.as_slice() {
            [] => Ok(()),
            left => write!(f, "; left as they are: {}", shown(left)),
        }
    }
}

/// A few layers with their reasons, and how many more there are.
fn shown(left: &[(String, &'static str)]) -> String {
    const MOST: usize = 4;
    let some: Vec<_> =
        left.iter().take(MOST).map(|(path, why)| format!("{path} ({why})")).collect();
    match left.len().saturating_sub(MOST) {
        0 => some.join(", "),
        more => format!("{} and {more} more", some.join(", ")),
    }
}

/// Puts the frozen weights of all linear layers of `module` in int8, on the CPU.
///
/// Layers that cannot be are left as they are, and listed. Adapters may be there before or come later; DoRA, PiSSA and
/// OLoRA need weights in floating point. A quantized module is neither saved, merged nor loaded anew.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::nn::{quantize_int8, Linear, Mode};
///
/// # fn main() -> candle_core::Result<()> {
/// let weight = Tensor::randn(0f32, 1f32, (8, 64), &Device::Cpu)?;
/// let x = Tensor::randn(0f32, 1f32, (3, 64), &Device::Cpu)?;
/// let mut layer = Linear::new(weight, None);
/// let exact = layer.forward(&x, Mode::Eval)?;
/// let quantized = quantize_int8(&mut layer).map_err(candle_core::Error::wrap)?;
/// assert_eq!((quantized.layers, quantized.after), (1, 8 * 64 + 8 * 4));
/// let error = (layer.forward(&x, Mode::Eval)? - exact)?.abs()?.max_all()?;
/// assert!(error.to_scalar::<f32>()? < 0.5);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - no layer can be quantized;
/// - a tensor cannot be read.
///
/// The module is unchanged then.
pub fn quantize_int8(module: &mut dyn ModuleTree) -> Result<Quantized> {
    let mut quantized = Quantized::default();
    let mut weights = BTreeMap::new();
    let mut failed = None;
    module.visit("", &mut |path, node| {
        let Node::Layer(layer) = node else { return };
        if layer.weight.rank() != 2 {
            return;
        }
        match in_int8(layer) {
            Ok(Ok(int8)) => drop(weights.insert(path.to_string(), int8)),
            Ok(Err(why)) => quantized.left.push((path.to_string(), why)),
            Err(error) => drop(failed.get_or_insert(error)),
        }
    });
    if let Some(error) = failed {
        return Err(error.into());
    }
    if weights.is_empty() {
        let left = shown(&quantized.left);
        return Err(Error::config(format!("no linear layer can be put in int8: {left}")));
    }
    module.visit_mut("", &mut |path, node| {
        let NodeMut::Layer(LayerMut { weight, scales: Some(scales), .. }) = node else {
            return Ok(());
        };
        if let Some((bytes, new_scales)) = weights.remove(path) {
            quantized.layers += 1;
            quantized.before += weight.elem_count() * weight.dtype().size_in_bytes();
            quantized.after += bytes.elem_count() + 4 * new_scales.elem_count();
            (*weight, *scales) = (bytes, Some(new_scales));
        }
        Ok(())
    })?;
    Ok(quantized)
}

/// The weight's bytes and scales, or why it has none.
fn in_int8(
    layer: Layer<'_>,
) -> candle_core::Result<std::result::Result<(Tensor, Tensor), &'static str>> {
    let Layer { weight, adapters, .. } = layer;
    let (out_dim, in_dim) = weight.dims2()?;
    let why = match () {
        () if weight.dtype() == DType::U8 => "is in int8 already",
        () if !weight.device().is_cpu() => "is not on the CPU",
        () if weight.track_op() => "is trained",
        () if adapters.unmerged.is_some() => "has a merged adapter",
        () if in_dim == 0 || in_dim % 4 != 0 => "its input's width is no multiple of 4",
        () if in_dim > MAX_DEPTH => "its input is too wide",
        () => "",
    };
    if !why.is_empty() {
        return Ok(Err(why));
    }
    let values = weight.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    let mut bytes = vec![0u8; values.len()];
    let rows = bytes.par_chunks_exact_mut(in_dim).zip(values.par_chunks_exact(in_dim));
    let scales: Vec<f32> = rows.map(|(bytes, row)| quantize_weight(row, bytes)).collect();
    if scales.iter().any(|scale| scale.is_nan()) {
        return Ok(Err("holds NaN or infinity"));
    }
    let bytes = Tensor::from_vec(bytes, (out_dim, in_dim), &Device::Cpu)?;
    Ok(Ok((bytes, Tensor::from_vec(scales, out_dim, &Device::Cpu)?)))
}

/// Fails where a module has a weight in int8, which cannot be `done` what is asked for.
///
/// # Errors
/// - a weight is in int8; the error names the first.
pub(crate) fn refuse_int8(module: &dyn ModuleTree, done: &str) -> Result<()> {
    let mut first = None;
    module.visit("", &mut |path, node| {
        if let Node::Layer(Layer { weight, .. }) = node {
            if weight.dtype() == DType::U8 {
                first.get_or_insert_with(|| path.to_string());
            }
        }
    });
    match first {
        Some(path) => Err(Error::config(format!("{path} is in int8 and cannot be {done}"))),
        None => Ok(()),
    }
}
