//! A product with a trained matrix, whose gradient is a sum over rows.
//!
//! ```text
//! y = drop(x) W^T        dx = drop(dy W)        dW = dy^T drop(x)        [rows, in], [out, in] -> [rows, out]
//! ```
//! On the CPU candle's product in f16 keeps partial sums in f16. Here 16-bit operands are widened to f32 while a product
//! runs; candle's graph keeps them as they are.

use super::computed::{storage_of, with_backward};
use crate::philox::Dropout;
use candle_core::{DType, Result, Tensor};

/// `drop(x) W^T` in `dtype`; `weight` may be f32 beside an `x` in 16 bits.
pub(super) fn product(
    x: &Tensor,
    weight: &Tensor,
    dropout: Option<Dropout>,
    dtype: DType,
) -> Result<Tensor> {
    let dtypes = [x.dtype(), weight.dtype(), dtype];
    if dropout.is_none() && dtypes == [DType::F32; 3] {
        return x.matmul(&weight.t()?);
    }
    // cuBLAS adds up 16-bit products in f32.
    let inner = if x.device().is_cpu() { DType::F32 } else { x.dtype() };
    let wide = move |tensor: &Tensor| tensor.detach().to_dtype(inner);
    let drop = move |tensor: Tensor| match dropout {
        Some(dropout) => super::dropout(&tensor, dropout),
        None => Ok(tensor),
    };
    let value = drop(wide(x)?)?.matmul(&wide(weight)?.t()?)?.to_dtype(dtype)?;
    let inputs = (x, Some(weight), None);
    with_backward("product", inputs, storage_of(&value)?, move |[x, weight, _], grad| {
        let grad = wide(grad)?;
        let dx = || drop(grad.matmul(&wide(weight)?)?)?.to_dtype(x.dtype());
        let dweight = || grad.t()?.matmul(&drop(wide(x)?)?)?.to_dtype(weight.dtype());
        let dx = x.track_op().then(dx).transpose()?;
        Ok((dx, weight.track_op().then(dweight).transpose()?, None))
    })
}
