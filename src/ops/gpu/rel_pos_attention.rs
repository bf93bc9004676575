//! Attention with relative positions by its kernels; `lse` stays on the GPU for the backward.

use crate::driver::{self, Job};
use crate::launch::plan::Plan;
use crate::launch::rel_pos_attention::{self as kernels, Given, Pass};
use crate::launch::Gpu;
use crate::ops::Gradients;
use crate::problem::AttentionProblem;
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Result, Shape, Storage, Tensor};
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
    pub fn forward(&self, inputs: [Tensor; 3]) -> Result<(CudaStorage, Shape, Tensor)> {
        let (p, dtype) = (&self.problem, inputs[0].dtype());
        let plan = self.plan(Pass::Forward, dtype)?;
        let shape = Shape::from((p.batch, p.h, p.w, p.channels()));
        let lse_shape = Shape::from(plan.saved);
        let all: Vec<_> = inputs.into_iter().chain(self.tables.iter().flatten().cloned()).collect();
        let job = Job { op: OP, plan: &plan, dropouts: &[p.dropout] };
        let outputs = [(dtype, &shape), (DType::F32, &lse_shape)];
        let [out, lse] = driver::with_storages(OP, &all, |inputs| job.run(inputs, outputs))?;
        let lse = Tensor::from_storage(Storage::Cuda(lse), lse_shape, BackpropOp::none(), false);
        Ok((out, shape, lse))
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
        // One element where nothing is wanted: there is no empty memory on the device.
        let none = Shape::from(1);
        let shape = |wanted, tensor| if wanted { Tensor::shape(tensor) } else { &none };
        let shapes = [qkv.shape(), shape(tables_wanted, tables), shape(pad_wanted, pad)];
        let job = Job { op: OP, plan: &plan, dropouts: &[self.problem.dropout] };
        let outputs = shapes.map(|shape| (dtype, shape));
        let [dqkv, dtables, dpad] = job.run_on_tensors(&inputs, outputs)?;
        Ok((Some(dqkv), tables_wanted.then_some(dtables), pad_wanted.then_some(dpad)))
    }
}
