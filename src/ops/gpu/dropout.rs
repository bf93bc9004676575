//! Dropout by its kernel: the mask is made where it is used, in both directions, and never stored.

use crate::driver::{self, Job};
use crate::launch::dropout as kernels;
use crate::ops::computed;
use crate::philox::Dropout;
use candle_core::{CudaStorage, Result, Storage, Tensor};

const OP: &str = Dropout::OP;

/// Drops elements of `x [.., C]`, seen as rows of `C`.
pub fn dropout(x: &Tensor, dropout: Dropout) -> Result<Tensor> {
    let value = (Storage::Cuda(run(x, dropout)?), x.shape().clone());
    computed::node(OP, (x, None, None), value, move |_, _, grad| {
        Ok((Some(driver::tensor(run(grad, dropout)?, grad.shape())), None, None))
    })
}

/// Forward and backward.
fn run(x: &Tensor, dropout: Dropout) -> Result<CudaStorage> {
    let (shape, dtype) = (x.shape(), x.dtype());
    let cols = x.dims().last().copied().unwrap_or(1);
    let plan = kernels::plan((x.elem_count() / cols, cols), dtype)?;
    let job = Job { op: OP, plan: &plan, dropouts: &[Some(dropout)] };
    let [y] = job.run(&[x], [(dtype, shape)])?;
    Ok(y)
}
