//! Projections with LoRA by their kernels; what the backward needs of the forward stays on the GPU.

use crate::driver::{self, Job};
use crate::launch::plan::Plan;
use crate::launch::projection::{self as kernels, Pass, Problem};
use crate::launch::Gpu;
use crate::philox::Dropout;
use crate::problem::{Activation, ProjectionProblem};
use candle_core::op::BackpropOp;
use candle_core::{CudaStorage, DType, Result, Shape, Storage, Tensor};
use std::sync::Arc;

/// Kept for the backward: S, and the sum before an activation.
pub struct Saved {
    low_rank: Tensor,
    sum: Tensor,
}

/// Projections by the kernels of a GPU.
pub struct Projections {
    /// The operation's name, for errors.
    pub op: &'static str,
    /// Shape of x.
    pub dims: Vec<usize>,
    pub problems: Vec<ProjectionProblem>,
    pub activation: Activation,
    /// Frozen weights, of the dtype of x.
    pub weights: Vec<Tensor>,
    /// The parameters, if they are frozen too: kernels read them in place.
    pub in_place: Option<Vec<Tensor>>,
    /// Whether there may be a backward.
    pub keep: bool,
    /// The GPU with the kernels that may be used.
    pub gpu: Gpu,
}

impl Projections {
    fn plan(&self, pass: Pass, dtype: DType) -> Result<Arc<Plan>> {
        let problem = Problem::of(&self.dims, &self.problems, self.activation);
        let typed = |tensors: &Vec<Tensor>| -> Vec<_> {
            tensors.iter().map(|tensor| tensor.dtype() != DType::F32).collect()
        };
        let in_place = self.in_place.as_ref().map(typed);
        kernels::plan(&problem, pass, in_place.as_deref(), dtype, &self.gpu)
    }

    /// The tensors that are no input of the operation: the weights, then parameters.
    fn captured(&self) -> impl Iterator<Item = &Tensor> {
        self.weights.iter().chain(self.in_place.iter().flatten())
    }

    fn dropouts(&self) -> Vec<Option<Dropout>> {
        self.problems.iter().map(|part| part.lora.and_then(|lora| lora.dropout)).collect()
    }

    /// Inputs: x, packed parameters, the residual; placeholders for the latter two.
    pub fn forward(
        &self,
        inputs: [Tensor; 3],
        residual: bool,
    ) -> Result<(CudaStorage, Shape, Saved)> {
        let dtype = inputs[0].dtype();
        let sum = self.keep && self.activation != Activation::Identity;
        let plan = self.plan(Pass::Forward { residual, sum }, dtype)?;
        let mut dims = self.dims.clone();
        if let Some(last) = dims.last_mut() {
            *last = self.problems.iter().map(|part| part.out_dim).sum();
        }
        let shape = Shape::from(dims);
        // One element where nothing is kept: there is no empty memory on the device.
        let low_rank_shape = Shape::from(plan.saved.max(1));
        let sum_shape = if sum { shape.clone() } else { Shape::from(1) };
        let all: Vec<_> = inputs.into_iter().chain(self.captured().cloned()).collect();
        let job = Job { op: self.op, plan: &plan, dropouts: &self.dropouts() };
        let outputs = [(dtype, &shape), (DType::F32, &low_rank_shape), (dtype, &sum_shape)];
        let [out, low_rank, sum] =
            driver::with_storages(self.op, &all, |inputs| job.run(inputs, outputs))?;
        let tensor = |storage, shape| {
            Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
        };
        let saved =
            Saved { low_rank: tensor(low_rank, low_rank_shape), sum: tensor(sum, sum_shape) };
        Ok((out, shape, saved))
    }

    /// The gradients of x and of the packed parameters, as far as they are wanted. Without that of the parameters nobody
    /// reads x, and any tensor of its dtype may take its place.
    pub fn backward(
        &self,
        [x, parameters]: [&Tensor; 2],
        [dx, dparameters]: [bool; 2],
        saved: &Saved,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let plan = self.plan(Pass::Backward { dx, parameters: dparameters }, x.dtype())?;
        let mut inputs = vec![x, parameters, &saved.low_rank, &saved.sum, grad];
        inputs.extend(self.captured());
        let unwanted = Shape::from(1);
        let shape = if dparameters { parameters.shape() } else { &unwanted };
        let x_shape = Shape::from(self.dims.as_slice());
        let outputs = [(x.dtype(), &x_shape), (DType::F32, shape)];
        let job = Job { op: self.op, plan: &plan, dropouts: &self.dropouts() };
        let [of_x, of_parameters] = job.run_on_tensors(&inputs, outputs)?;
        Ok((dx.then_some(of_x), dparameters.then_some(of_parameters)))
    }
}
