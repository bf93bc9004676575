//! Products whose gradients are sums over rows.
//!
//! ```text
//! y = drop(a) b        da = drop(dy b^T)        db = drop(a)^T dy        [.., rows, k], [.., k, n] -> [.., rows, n]
//! ```
//! On the CPU candle's product in f16 rounds partial sums to f16. Here 16-bit operands are widened to f32 while a
//! product runs; candle's graph keeps them as they are.

use super::computed::with_backward;
use crate::philox::Dropout;
use candle_core::{DType, Result, Tensor, D};

/// `a b` in the dtype of `a`, `[.., rows, k] [.., k, n] -> [.., rows, n]`, summed in f32.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::ops::matmul;
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let ones = Tensor::ones((1, 4096), DType::F16, &Device::Cpu)?;
/// let y = matmul(&ones, &ones.t()?)?.to_dtype(DType::F32)?;
/// assert_eq!(y.to_vec2::<f32>()?, [[4096.0]]); // a sum of ones in f16 ends at 2048
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// When the shapes do not fit, or the tensors are on several devices.
pub fn matmul(a: &Tensor, b: &Tensor) -> Result<Tensor> {
    product(a, b, None, a.dtype())
}

/// `drop(a) b` in `dtype`; `a` is a matrix where it is dropped. The operands may differ in dtype.
pub(super) fn product(
    a: &Tensor,
    b: &Tensor,
    dropout: Option<Dropout>,
    dtype: DType,
) -> Result<Tensor> {
    // cuBLAS adds up 16-bit products in f32.
    let inner = if a.device().is_cpu() { DType::F32 } else { a.dtype() };
    if dropout.is_none() && [a.dtype(), b.dtype(), dtype] == [inner; 3] {
        return a.matmul(b);
    }
    let wide = move |tensor: &Tensor| tensor.detach().to_dtype(inner);
    let drop = move |tensor: Tensor| match dropout {
        Some(dropout) => super::dropout(&tensor, dropout),
        None => Ok(tensor),
    };
    let transposed = |tensor: Tensor| tensor.transpose(D::Minus2, D::Minus1);
    let value = drop(wide(a)?)?.matmul(&wide(b)?)?.to_dtype(dtype)?;
    let inputs = (a, Some(b), None);
    with_backward("product", inputs, value, move |[a, b, _], grad| {
        let grad = wide(grad)?;
        let da = || drop(grad.matmul(&transposed(wide(b)?)?)?)?.to_dtype(a.dtype());
        let db = || transposed(drop(wide(a)?)?)?.matmul(&grad)?.to_dtype(b.dtype());
        let da = a.track_op().then(da).transpose()?;
        Ok((da, b.track_op().then(db).transpose()?, None))
    })
}
