//! Projections with LoRA by their kernels; what the backward needs of the forward stays on the GPU.

use super::Input;
use crate::driver::{self, Job};
use crate::launch::projection::{
    self as kernels, BackwardOperands, ForwardOperands, Plan, Problem, Small, SmallTensor,
};
use crate::launch::{device_ptr, Gpu};
use crate::problem::Activation;
use candle_core::backend::BackendStorage;
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaStorage, DType, Error, Result, Shape, Storage, Tensor};

/// Kept for the backward: S, and the sum before an activation.
pub struct Saved {
    low_rank: Tensor,
    sum: Tensor,
}

/// The operation's name, its problem, its frozen weights, and the small tensors if they are frozen too.
#[derive(Clone, Copy)]
pub struct Projections<'a> {
    pub op: &'static str,
    pub problem: Problem<'a>,
    pub weights: &'a [Tensor],
    pub separate: Option<&'a [Tensor]>,
    /// Whether there may be a backward of x or the small tensors.
    pub keep: bool,
    /// The GPU with the kernels that may be used.
    pub gpu: Gpu,
}

impl Projections<'_> {
    /// What is no input of the operation: the weights, then small tensors.
    fn captured(&self) -> impl Iterator<Item = &Tensor> {
        self.weights.iter().chain(self.separate.unwrap_or_default())
    }

    /// The addresses of the weights, and those of the small tensors if they were captured.
    fn split<'b>(
        &self,
        captured: &'b [device_ptr],
    ) -> Result<(&'b [device_ptr], Option<Vec<SmallTensor>>)> {
        let Some((weights, separate)) = captured.split_at_checked(self.weights.len()) else {
            bail!("{}: {} weights, expected {}", self.op, captured.len(), self.weights.len())
        };
        let small =
            |(&at, tensor): (_, &Tensor)| SmallTensor { at, typed: tensor.dtype() != DType::F32 };
        let separate = self.separate.map(|tensors| separate.iter().zip(tensors).map(small));
        Ok((weights, separate.map(Iterator::collect)))
    }

    fn plan(&self, dtype: DType) -> Result<Plan<'_>> {
        let plan = kernels::plan(self.problem, dtype, &self.gpu);
        plan.ok_or_else(|| Error::msg(format!("{}: no kernel computes this problem", self.op)))
    }

    fn has_lora(&self) -> bool {
        kernels::low_rank_len(&self.problem) > 0
    }

    fn keeps_sum(&self) -> bool {
        self.keep && self.problem.activation != Activation::Identity
    }

    /// Inputs: x, the flat small tensors, the residual; placeholders for the latter two.
    pub fn forward(
        &self,
        inputs: [Input<'_>; 3],
        residual_present: bool,
    ) -> Result<(CudaStorage, Shape, Saved)> {
        let [(x, layout), ..] = inputs;
        let dtype = x.dtype();
        let plan = self.plan(dtype)?;
        let mut dims = layout.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.problem.projections.iter().map(|p| p.out_dim).sum();
        }
        let shape = Shape::from(dims);
        // One element where nothing is kept: there is no empty memory on the device.
        let low_rank_shape = Shape::from(kernels::low_rank_len(&self.problem).max(1));
        let sum_shape = if self.keeps_sum() { shape.clone() } else { Shape::from(1) };

        let guards: Vec<_> = self.captured().map(Tensor::storage_and_layout).collect();
        let mut inputs = inputs.to_vec();
        for (storage, layout) in &guards {
            match &**storage {
                Storage::Cuda(storage) => inputs.push((storage, *layout)),
                _ => bail!("{}: a parameter left the GPU", self.op),
            }
        }
        let outputs = [
            (dtype, shape.clone()),
            (DType::F32, low_rank_shape.clone()),
            (dtype, sum_shape.clone()),
        ];
        let job =
            Job { op: self.op, device: x.device(), inputs: &inputs, outputs, workspace_bytes: 0 };
        let [out, low_rank, sum] = driver::run(&job, |at| {
            let ([x, small, residual], captured) = at.first_inputs()?;
            let (weights, separate) = self.split(captured)?;
            let [out, low_rank, sum] = at.outputs;
            let operands = ForwardOperands {
                x,
                weights,
                small: separate.as_deref().map_or(Small::Flat(small), Small::Separate),
                residual: if residual_present { residual } else { 0 },
                out,
                low_rank: if self.has_lora() { low_rank } else { 0 },
                sum: if self.keeps_sum() { sum } else { 0 },
            };
            plan.forward(&operands)
        })?;
        let tensor = |storage, shape| {
            Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
        };
        let saved =
            Saved { low_rank: tensor(low_rank, low_rank_shape), sum: tensor(sum, sum_shape) };
        Ok((out, shape, saved))
    }

    /// The gradients of x and of the small tensors, as far as they are wanted.
    pub fn backward(
        &self,
        x: &Tensor,
        small: &Tensor,
        saved: &Saved,
        grad: &Tensor,
        wanted: (bool, bool),
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dtype = x.dtype();
        let plan = self.plan(dtype)?;
        let mut inputs = vec![x, small, &saved.low_rank, &saved.sum, grad];
        inputs.extend(self.captured());
        let unwanted = Shape::from(1);
        let dsmall_shape = if wanted.1 { small.shape() } else { &unwanted };
        let outputs = [(dtype, x.shape()), (DType::F32, dsmall_shape)];
        let [dx, dsmall] =
            driver::with_tensors(self.op, &inputs, outputs, plan.workspace_bytes(), |at| {
                let ([x, small, low_rank, sum, dout], captured) = at.first_inputs()?;
                let (weights, separate) = self.split(captured)?;
                let [dx, dsmall] = at.outputs;
                let operands = BackwardOperands {
                    x,
                    weights,
                    small: separate.as_deref().map_or(Small::Flat(small), Small::Separate),
                    low_rank: if self.has_lora() { low_rank } else { 0 },
                    sum: if self.keeps_sum() { sum } else { 0 },
                    dout,
                    dx: if wanted.0 { dx } else { 0 },
                    dsmall: if wanted.1 { dsmall } else { 0 },
                    workspace: at.workspace,
                };
                plan.backward(&operands)
            })?;
        Ok((wanted.0.then_some(dx), wanted.1.then_some(dsmall)))
    }
}
