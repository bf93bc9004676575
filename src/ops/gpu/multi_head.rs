//! Attention between two sets of tokens by its kernels; the statistics of the softmax stay on the GPU for the backward.

use crate::driver::{self, Job};
use crate::launch::multi_head::{self as kernels, Pass};
use crate::launch::Gpu;
use crate::ops::Gradients;
use crate::problem::MultiHeadProblem;
use candle_core::{CudaStorage, DType, Result, Shape, Tensor};

const OP: &str = MultiHeadProblem::OP;

/// Attention by the kernels of a GPU.
pub struct MultiHead {
    pub problem: MultiHeadProblem,
    /// The GPU with the kernels that may be used.
    pub gpu: Gpu,
}

impl MultiHead {
    /// Inputs: q, k, v. Returns the output, and what a backward needs.
    pub fn forward(&self, inputs: [&Tensor; 3]) -> Result<(CudaStorage, Shape, Tensor)> {
        let (p, dtype) = (&self.problem, inputs[0].dtype());
        let saves = inputs.iter().any(|input| input.track_op());
        let plan = kernels::plan(p, Pass::Forward { saves }, dtype, &self.gpu)?;
        let shape = Shape::from((p.batch, p.queries, p.channels()));
        // One element where nothing is kept: there is no empty memory on the device.
        let saved_shape = Shape::from(plan.saved.max(1));
        let job = Job { op: OP, plan: &plan, dropouts: &[] };
        let outputs = [(dtype, &shape), (DType::F32, &saved_shape)];
        let [out, saved] = job.run(&inputs, outputs)?;
        Ok((out, shape, driver::tensor(saved, saved_shape)))
    }

    /// Inputs: q, k, v; the output and what the forward saved; the output's gradient.
    pub fn backward(
        &self,
        inputs: [&Tensor; 3],
        (out, saved): (&Tensor, &Tensor),
        grad: &Tensor,
    ) -> Result<Gradients> {
        let [q, k, v] = inputs;
        let [of_q, of_k, of_v] = inputs.map(Tensor::track_op);
        let (dtype, pass) = (q.dtype(), Pass::Backward { q: of_q, kv: of_k || of_v });
        let plan = kernels::plan(&self.problem, pass, dtype, &self.gpu)?;
        let job = Job { op: OP, plan: &plan, dropouts: &[] };
        let output = |wanted: bool, like| wanted.then_some((dtype, Tensor::shape(like)));
        let outputs = [output(of_q, q), output(of_k || of_v, k), output(of_k || of_v, v)];
        let [dq, dk, dv] = job.run_to_tensors(&[q, k, v, out, saved, grad], outputs)?;
        Ok((dq, dk.filter(|_| of_k), dv.filter(|_| of_v)))
    }
}
