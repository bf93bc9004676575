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
        let (shape, dtype) = (layout.shape(), x.dtype());
        let plan = kernels::plan(self.size, dtype)?;
        let job = Job { op: OP, plan: &plan, dropouts: &[Some(self.dropout)] };
        let [y] = job.run(&[(x, layout)], [(dtype, shape)])?;
        Ok((y, shape.clone()))
    }

    fn bwd(&self, x: &Tensor, _res: &Tensor, grad_res: &Tensor) -> Result<Option<Tensor>> {
        let plan = kernels::plan(self.size, x.dtype())?;
        let job = Job { op: OP, plan: &plan, dropouts: &[Some(self.dropout)] };
        let [dx] = job.run_on_tensors(&[grad_res], [Some((x.dtype(), x.shape()))])?;
        Ok(dx)
    }
}
