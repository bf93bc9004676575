//! Attention with relative positions by its kernels; `lse` stays on the GPU for the backward.

use super::Input;
use crate::driver::{self, Job};
use crate::launch::rel_pos_attention::{self as kernels, BackwardOperands, Inputs, Plan};
use crate::launch::{device_ptr, Gpu};
use crate::ops::Gradients;
use crate::problem::AttentionProblem;
use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaStorage, DType, Error, Result, Shape, Storage, Tensor};

const OP: &str = AttentionProblem::OP;

/// The problem, its tables if they are no input of the operation, whether there is a pad, and the GPU with the kernels that
/// may be used.
#[derive(Clone, Copy)]
pub struct Attention<'a> {
    pub problem: &'a AttentionProblem,
    pub tables: Option<&'a [Tensor; 2]>,
    pub pad: bool,
    pub gpu: Gpu,
}

/// The address of an operand, 0 if it is absent.
fn address(present: bool, address: device_ptr) -> device_ptr {
    if present {
        address
    } else {
        0
    }
}

impl Attention<'_> {
    fn plan(&self, dtype: DType) -> Result<Plan> {
        let plan = kernels::plan(self.problem, dtype, &self.gpu);
        plan.ok_or_else(|| Error::msg(format!("{OP}: no kernel computes {:?}", self.problem)))
    }

    /// The addresses of the inputs: qkv, both tables in one tensor or a placeholder, pad or a placeholder; and of the
    /// tables that are none.
    fn at(
        &self,
        dtype: DType,
        [qkv, tables, pad]: [device_ptr; 3],
        separate: &[device_ptr],
    ) -> Inputs {
        let (rows_h, _) = self.problem.table_rows();
        let bytes_h = (rows_h * self.problem.head_dim * dtype.size_in_bytes()) as u64;
        let tables = match (separate, self.problem.rel_pos) {
            (&[h, w], _) => [h, w],
            (_, true) => [tables, tables + bytes_h],
            (_, false) => [0; 2],
        };
        Inputs { qkv, tables, pad: address(self.pad, pad) }
    }

    /// Inputs: qkv, both tables, pad, the latter two or placeholders. Returns the output with its shape, and lse.
    pub fn forward(&self, inputs: [Input<'_>; 3]) -> Result<(CudaStorage, Shape, Tensor)> {
        let [(qkv, _), ..] = inputs;
        let (problem, dtype) = (self.problem, qkv.dtype());
        let plan = self.plan(dtype)?;
        let shape = Shape::from((problem.batch, problem.h, problem.w, problem.channels()));
        let lse_shape = Shape::from(kernels::lse_elements(problem, dtype));
        let outputs = [(dtype, shape.clone()), (DType::F32, lse_shape.clone())];
        let guards: Vec<_> =
            self.tables.into_iter().flatten().map(Tensor::storage_and_layout).collect();
        let mut all = inputs.to_vec();
        for (storage, layout) in &guards {
            match &**storage {
                Storage::Cuda(storage) => all.push((storage, *layout)),
                _ => bail!("{OP}: a table left the GPU"),
            }
        }
        let job = Job { op: OP, device: qkv.device(), inputs: &all, outputs, workspace_bytes: 0 };
        let [out, lse] = driver::run(&job, |at| {
            let (inputs, separate) = at.first_inputs()?;
            let (inputs, [out, lse]) = (self.at(dtype, inputs, separate), at.outputs);
            plan.forward(&inputs, out, lse)
        })?;
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
        let (problem, dtype) = (self.problem, qkv.dtype());
        let tables_wanted = problem.rel_pos && tables.track_op();
        let pad_wanted = self.pad && pad.track_op();
        let plan = self.plan(dtype)?;
        let workspace_bytes = plan.workspace_bytes([tables_wanted, pad_wanted])?;
        let mut inputs = vec![qkv, tables, pad, out, lse, grad];
        inputs.extend(self.tables.into_iter().flatten());
        // One element where nothing is wanted: there is no empty memory on the device.
        let none = Shape::from(1);
        let wanted = |wanted, tensor: &'_ Tensor| match wanted {
            true => tensor.shape().clone(),
            false => none.clone(),
        };
        let (dtables_shape, dpad_shape) = (wanted(tables_wanted, tables), wanted(pad_wanted, pad));
        let outputs = [qkv.shape(), &dtables_shape, &dpad_shape].map(|shape| (dtype, shape));
        let [dqkv, dtables, dpad] =
            driver::with_tensors(OP, &inputs, outputs, workspace_bytes, |at| {
                let ([qkv, tables, pad, out, lse, dout], separate) = at.first_inputs()?;
                let [dqkv, dtables, dpad] = at.outputs;
                let inputs = self.at(dtype, [qkv, tables, pad], separate);
                let operands = BackwardOperands {
                    out,
                    lse,
                    dout,
                    dqkv,
                    dtables: address(tables_wanted, dtables),
                    dpad: address(pad_wanted, dpad),
                    workspace: at.workspace,
                };
                plan.backward(&inputs, &operands)
            })?;
        Ok((Some(dqkv), tables_wanted.then_some(dtables), pad_wanted.then_some(dpad)))
    }
}
