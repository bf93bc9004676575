//! Dropout whose mask is a function of the element's place; see [`crate::philox`].

use super::check;
use crate::philox::Dropout;
use candle_core::{Result, Tensor};

const OP: &str = Dropout::OP;

/// Drops elements of `x [.., C]`, seen as rows of `C`; the kept ones are scaled. The shape stays.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::ops::{dropout, stream_of, Dropout};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let drop = Dropout { p: 0.5, seed: 1, stream: stream_of("head.dropout") };
/// let x = Tensor::ones((4, 8), DType::F32, &Device::Cpu)?;
/// let y = dropout(&x, drop)?.to_vec2::<f32>()?;
/// assert!(y.iter().flatten().all(|&y| y == 0.0 || y == 2.0));
/// assert_eq!(y, dropout(&x, drop)?.to_vec2::<f32>()?); // equal seeds and streams drop equal elements
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// On empty tensors, other dtypes than f32, f16 and bf16, a probability outside `[0, 1)`.
pub fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    check::float(OP, "x", x)?;
    check::not_empty(OP, "x", x)?;
    dropout.validate(OP)?;
    let cols = x.dims()[x.rank() - 1];
    #[cfg(feature = "cuda")]
    if super::custom::has_kernels(x.device()) {
        return super::gpu::dropout::dropout(x, dropout);
    }
    let mask = dropout.mask(x.elem_count() / cols, cols);
    x * Tensor::from_vec(mask, x.dims(), x.device())?.to_dtype(x.dtype())?
}
