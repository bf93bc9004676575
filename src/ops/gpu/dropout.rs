//! Dropout by its kernel: the mask is made where it is used, in both directions, and never stored.

use crate::driver::{self, Job};
use crate::launch::dropout as kernels;
use crate::philox::Dropout;
use candle_core::backend::BackendStorage;
use candle_core::{bail, CpuStorage, CudaStorage, CustomOp1, Layout, Result, Shape, Tensor};

/// Drops elements of `x [.., C]`, seen as rows of `C`.
pub fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    let cols = x.dims().last().copied().unwrap_or(1);
    driver::operand(x)?.apply_op1(FusedDropout { size: (x.elem_count() / cols, cols), dropout })
}

const OP: &str = Dropout::OP;

struct FusedDropout {
    /// Rows and columns.
    size: (usize, usize),
    dropout: Dropout,
}

impl CustomOp1 for FusedDropout {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        bail!("{OP}: this form of it is for the GPU")
    }

    fn cuda_fwd(&self, x: &CudaStorage, layout: &Layout) -> Result<(CudaStorage, Shape)> {
        let (shape, dtype) = (layout.shape().clone(), x.dtype());
        let (inputs, outputs) = ([(x, layout)], [(dtype, shape.clone())]);
        let job = Job { op: OP, device: x.device(), inputs: &inputs, outputs, workspace_bytes: 0 };
        let [y] = driver::run(&job, |at| {
            let ([x], [y]) = (at.inputs()?, at.outputs);
            Ok(vec![kernels::forward(self.size, self.dropout, dtype, x, y)?])
        })?;
        Ok((y, shape))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad_res: &Tensor) -> Result<Option<Tensor>> {
        let dtype = x.dtype();
        let [dx] = driver::with_tensors(OP, &[grad_res], [(dtype, x.shape())], 0, |at| {
            let ([dy], [dx]) = (at.inputs()?, at.outputs);
            Ok(vec![kernels::forward(self.size, self.dropout, dtype, dy, dx)?])
        })?;
        Ok(Some(dx))
    }
}
