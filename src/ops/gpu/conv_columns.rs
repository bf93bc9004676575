//! A convolution's columns by their kernels.

use crate::driver::Job;
use crate::launch::conv_columns::{plan, Pass};
use crate::problem::ConvColumns;
use candle_core::{CudaStorage, Result, Shape, Tensor};

const OP: &str = ConvColumns::OP;

/// The columns of x.
pub fn forward(problem: &ConvColumns, x: &Tensor) -> Result<(CudaStorage, Shape)> {
    let shape = Shape::from((problem.batch, problem.rows(), problem.cols(), problem.width()));
    let (plan, dtype) = (plan(problem, Pass::Forward, x.dtype())?, x.dtype());
    let job = Job { op: OP, plan: &plan, dropouts: &[] };
    let [columns] = job.run(&[x], [(dtype, &shape)])?;
    Ok((columns, shape))
}

/// The gradient of x for that of the columns.
pub fn backward(problem: &ConvColumns, grad: &Tensor) -> Result<Option<Tensor>> {
    let &ConvColumns { batch, h, w, channels, .. } = problem;
    let plan = plan(problem, Pass::Backward, grad.dtype())?;
    let job = Job { op: OP, plan: &plan, dropouts: &[] };
    let shape = Shape::from((batch, h, w, channels));
    let [dx] = job.run_to_tensors(&[grad], [Some((grad.dtype(), &shape))])?;
    Ok(dx)
}
