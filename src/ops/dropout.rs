//! Dropout whose mask is a function of the element's place; see [`crate::philox`].

use super::check;
#[cfg(feature = "cuda")]
use super::custom::{fused_on, operand};
use crate::philox::Dropout;
use candle_core::{Result, Tensor};

const OP: &str = "dropout";

/// Drops elements of `x [.., C]`, seen as rows of `C`; the kept ones are scaled. The shape stays.
///
/// # Errors
/// On empty tensors, other dtypes than f32, f16 and bf16, a probability outside `[0, 1)`.
pub fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    check::float(OP, "x", x)?;
    check::not_empty(OP, "x", x)?;
    dropout.validate(OP)?;
    let cols = x.dims()[x.rank() - 1];
    #[cfg(feature = "cuda")]
    if x.device().is_cuda() && fused_on(x.device()) {
        let rows = x.elem_count() / cols;
        return operand(x)?.apply_op1(gpu::FusedDropout { rows, cols, dropout });
    }
    let mask = dropout.mask(x.elem_count() / cols, cols);
    x * Tensor::from_vec(mask, x.dims(), x.device())?.to_dtype(x.dtype())?
}

/// On the GPU the mask is made where it is used, in both directions.
#[cfg(feature = "cuda")]
mod gpu {
    use super::{Dropout, OP};
    use crate::{cuda, launch::dropout as kernels};
    use candle_core::backend::BackendStorage;
    use candle_core::{bail, CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor};

    pub struct FusedDropout {
        pub rows: usize,
        pub cols: usize,
        pub dropout: Dropout,
    }

    impl CustomOp1 for FusedDropout {
        fn name(&self) -> &'static str {
            OP
        }

        fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
            bail!("{OP}: this form of it is for the GPU")
        }

        fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
            let (shape, dtype) = (layout.shape(), x.dtype());
            let job = cuda::Job {
                op: OP,
                device: x.device(),
                inputs: &[(x, layout)],
                outputs: [(dtype, shape.clone())],
                workspace_bytes: 0,
            };
            let [y] = cuda::run(&job, |at| {
                let ([x], [y]) = (at.inputs()?, at.outputs);
                Ok(vec![kernels::forward((self.rows, self.cols), self.dropout, dtype, x, y)?])
            })?;
            Ok((y, shape.clone()))
        }

        fn bwd(&self, x: &Tensor, _res: &Tensor, grad_res: &Tensor) -> Result<Option<Tensor>> {
            let dtype = x.dtype();
            let [dx] = cuda::with_tensors(OP, &[grad_res], [(dtype, x.shape())], 0, |at| {
                let ([dy], [dx]) = (at.inputs()?, at.outputs);
                Ok(vec![kernels::forward((self.rows, self.cols), self.dropout, dtype, dy, dx)?])
            })?;
            Ok(Some(dx))
        }
    }
}
