//! Numerical tests of an operation of your own: naive loops in f64, finite differences, a graph of candle's operations.
//!
//! - [`reference`](mod@reference): this crate's operations as loops over slices. Combine them into the loops of yours.
//! - [`composed`]: the same operations as graphs of candle's own, differentiable by candle.
//! - [`check_gradients`]: each gradient against finite differences of the loss.
//! - [`relative_error`]: how far a result is from what it should be.
//!
//! Enable the feature `testing` for tests alone, under `[dev-dependencies]`. The three oracles share no code with each
//! other, so an error that one of them hides another one shows:
//!
//! ```
//! use candle_core::{CpuStorage, CustomOp2, Device, Layout, Result, Shape, Tensor, Var};
//! use candle_sam_lora::ops::{Activation, Projection};
//! use candle_sam_lora::testing::{check_gradients, composed, reference, relative_error, values};
//!
//! /// `max(x W^T, 0)` of `x [rows, in]` and `W [out, in]`, in f32 on the CPU, both contiguous.
//! struct LinearRelu;
//!
//! impl CustomOp2 for LinearRelu {
//!     fn name(&self) -> &'static str {
//!         "linear-relu"
//!     }
//!
//!     fn cpu_fwd(
//!         &self, x: &CpuStorage, x_layout: &Layout, w: &CpuStorage, w_layout: &Layout,
//!     ) -> Result<(CpuStorage, Shape)> {
//!         let (x, w) = (x.as_slice::<f32>()?, w.as_slice::<f32>()?);
//!         let ((rows, size), (out, _)) = (x_layout.shape().dims2()?, w_layout.shape().dims2()?);
//!         let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>();
//!         let y = x.chunks(size).flat_map(|x| w.chunks(size).map(move |w| dot(x, w).max(0.0)));
//!         Ok((CpuStorage::F32(y.collect()), (rows, out).into()))
//!     }
//!
//!     fn bwd(
//!         &self, x: &Tensor, w: &Tensor, y: &Tensor, grad: &Tensor,
//!     ) -> Result<(Option<Tensor>, Option<Tensor>)> {
//!         let grad = (grad * y.gt(0f32)?.to_dtype(grad.dtype())?)?;
//!         Ok((Some(grad.matmul(w)?), Some(grad.t()?.matmul(x)?)))
//!     }
//! }
//!
//! # fn main() -> candle_sam_lora::Result<()> {
//! let normal = |dims: (usize, usize)| Var::randn(0f32, 1f32, dims, &Device::Cpu);
//! let (x, w) = (normal((5, 8))?, normal((6, 8))?);
//! let run = || x.apply_op2(&w, LinearRelu);
//!
//! // Naive loops.
//! let loops: Vec<f64> =
//!     reference::linear(&values(&x)?, &values(&w)?, 8).into_iter().map(|y| y.max(0.0)).collect();
//! assert!(relative_error(&values(&run()?)?, &loops)? < 1e-6);
//!
//! // Finite differences.
//! let variables = [("x", x.clone()), ("w", w.clone())];
//! check_gradients(variables, || run()?.sqr()?.sum_all())?;
//!
//! // A graph of candle's operations, and its gradients.
//! let projection = Projection { weight: &w, scales: None, bias: None, lora: None };
//! let graph = composed::lora_linear(&x, &projection, Activation::Relu, None)?;
//! let (ours, theirs) = (run()?.sqr()?.sum_all()?.backward()?, graph.sqr()?.sum_all()?.backward()?);
//! for var in [&x, &w] {
//!     let (ours, theirs) = (ours.get(var).unwrap(), theirs.get(var).unwrap());
//!     assert!(relative_error(&values(ours)?, &values(theirs)?)? < 1e-5);
//! }
//! # Ok(())
//! # }
//! ```

mod gradients;
pub mod reference;

pub use crate::cpu::simd::{allow_instructions, Instructions};
pub use crate::train::slope::values;
pub use gradients::{check_gradients, GradientCheck, GradientReport, Verdict};

/// The operations as graphs of candle's own, but for gradients that are sums over rows: those are taken in f32.
///
/// Every intermediate is kept, and the attention builds its `N x N` weights. [`ops`](crate::ops) runs these graphs
/// where its own code does not apply.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use candle_sam_lora::{ops, testing::{composed, relative_error, values}};
///
/// # fn main() -> candle_core::Result<()> {
/// let x = Tensor::randn(0f32, 1f32, (4, 6), &Device::Cpu)?;
/// let (weight, bias) = (Tensor::randn(0f32, 1f32, 6, &Device::Cpu)?, Tensor::randn(0f32, 1f32, 6, &Device::Cpu)?);
/// let fused = values(&ops::layer_norm(&x, &weight, &bias, 1e-6)?)?;
/// let graph = values(&composed::layer_norm(&x, &weight, &bias, 1e-6)?)?;
/// assert!(relative_error(&fused, &graph)? < 1e-5);
/// # Ok(())
/// # }
/// ```
pub mod composed {
    pub use crate::ops::composed::*;
}

/// The largest difference, relative to the largest magnitude expected.
///
/// Below a magnitude of 1e-6 the difference itself: such a result cancels from terms of order one.
///
/// [Example](crate::testing)
///
/// # Errors
/// - the lengths differ;
/// - a result is not finite.
pub fn relative_error(got: &[f64], expected: &[f64]) -> candle_core::Result<f64> {
    if got.len() != expected.len() {
        candle_core::bail!("{} results, expected {}", got.len(), expected.len())
    }
    if let Some(bad) = got.iter().find(|x| !x.is_finite()) {
        candle_core::bail!("a result is {bad}")
    }
    let largest = |values: &mut dyn Iterator<Item = f64>| values.fold(0f64, |m, x| m.max(x.abs()));
    let magnitude = largest(&mut expected.iter().copied());
    let scale = if magnitude < 1e-6 { 1.0 } else { magnitude };
    Ok(largest(&mut got.iter().zip(expected).map(|(a, b)| a - b)) / scale)
}
