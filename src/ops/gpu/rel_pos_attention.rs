//! Attention with relative positions by its kernels; `lse` stays on the GPU for the backward.

use crate::driver::{self, Job};
use crate::launch::plan::Plan;
use crate::launch::rel_pos_attention::{self as kernels, Given, Pass};
use crate::launch::Gpu;
use crate::ops::Gradients;
use crate::problem::AttentionProblem;
use candle_core::{bail, CudaStorage, DType, Result, Shape, Tensor};
use std::sync::Arc;

const OP: &str = AttentionProblem::OP;

/// Attention by the kernels of a GPU: the problem, its tables if they are read in place, and whether there is a pad.
pub struct Attention {
    pub problem: AttentionProblem,
    pub tables: Option<[Tensor; 2]>,
    pub pad: bool,
    /// The GPU with the kernels that may be used.
    pub gpu: Gpu,
}

impl Attention {
    fn plan(&self, pass: Pass, dtype: DType) -> Result<Arc<Plan>> {
        let given = Given { tables_in_place: self.tables.is_some(), pad: self.pad };
        kernels::plan(&self.problem, given, pass, dtype, &self.gpu)
    }

    /// Inputs: qkv, both tables, pad, the latter two or placeholders. Returns the output, and lse.
    pub fn forward(&self, inputs: [&Tensor; 3]) -> Result<(CudaStorage, Shape, Tensor)> {
        let (p, dtype) = (&self.problem, inputs[0].dtype());
        if driver::is_recording() && p.dropout.is_some() {
            bail!("the attention's dropout has one mask for all replays, so no step with it is recorded")
        }
        let plan = self.plan(Pass::Forward, dtype)?;
        let shape = Shape::from((p.batch, p.h, p.w, p.channels()));
        let lse_shape = Shape::from(plan.saved);
        let inputs: Vec<_> = inputs.into_iter().chain(self.tables.iter().flatten()).collect();
        let job = Job { op: OP, plan: &plan, dropouts: &[p.dropout] };
        let outputs = [(dtype, &shape), (DType::F32, &lse_shape)];
        let [out, lse] = job.run(&inputs, outputs)?;
        Ok((out, shape, driver::tensor(lse, lse_shape)))
    }

    /// Inputs: qkv, both tables, pad; the output and lse; the output's gradient.
    pub fn backward(
        &self,
        inputs: [&Tensor; 3],
        (out, lse): (&Tensor, &Tensor),
        grad: &Tensor,
    ) -> Result<Gradients> {
        let [qkv, tables, pad] = inputs;
        let dtype = qkv.dtype();
        let tables_wanted = self.problem.rel_pos && tables.track_op();
        let pad_wanted = self.pad && pad.track_op();
        let plan = self.plan(Pass::Backward { tables: tables_wanted, pad: pad_wanted }, dtype)?;
        let mut inputs = vec![qkv, tables, pad, out, lse, grad];
        inputs.extend(self.tables.iter().flatten());
        let job = Job { op: OP, plan: &plan, dropouts: &[self.problem.dropout] };
        let outputs = [(true, qkv), (tables_wanted, tables), (pad_wanted, pad)];
        let outputs = outputs.map(|(wanted, like)| wanted.then_some((dtype, like.shape())));
        let [dqkv, dtables, dpad] = job.run_to_tensors(&inputs, outputs)?;
        Ok((dqkv, dtables, dpad))
    }
}
