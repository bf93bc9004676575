//! Projections with LoRA by their kernels; what the backward needs of the forward stays on the GPU.

use crate::driver::{self, Job};
use crate::launch::plan::Plan;
use crate::launch::projection::{self as kernels, Parameter, Pass, Problem};
use crate::launch::Gpu;
use crate::ops::collector::Collector;
use crate::philox::Dropout;
use crate::problem::{Activation, ProjectionProblem};
use candle_core::{bail, CudaStorage, DType, Result, Shape, Tensor};
use std::sync::Arc;

/// Kept for the backward: S, and the sum before an activation.
pub struct Saved {
    low_rank: Option<Tensor>,
    sum: Option<Tensor>,
}

/// Trained parameters whose gradients a collector gets.
pub struct Collected {
    pub collector: Arc<Collector>,
    pub tensors: Vec<Tensor>,
    /// Whether candle's store gets that of the first one, which is an input of the operation.
    pub but_first: bool,
}

/// Projections by the kernels of a GPU.
pub struct Projections {
    /// The operation's name, for errors.
    pub op: &'static str,
    /// Shape of x.
    pub shape: Shape,
    pub problems: Vec<ProjectionProblem>,
    pub activation: Activation,
    /// Frozen weights, of the dtype of x.
    pub weights: Vec<Tensor>,
    /// Biases and adapters, in the order of `small_layout`.
    pub parameters: Vec<Parameter>,
    /// Those of them that kernels read in place.
    pub in_place: Vec<Tensor>,
    /// None where candle's store gets the gradients of all trained parameters, packed.
    pub collected: Option<Collected>,
    /// Whether there may be a backward.
    pub keep: bool,
    /// The GPU with the kernels that may be used.
    pub gpu: Gpu,
}

impl Projections {
    fn plan(&self, pass: Pass, dtype: DType) -> Result<Arc<Plan>> {
        let problem = Problem::of(self.shape.dims(), &self.problems, self.activation);
        kernels::plan(&problem, pass, Some(&self.parameters), dtype, &self.gpu)
    }

    /// The tensors that are no input of the operation: the weights, then parameters.
    fn captured(&self) -> impl Iterator<Item = &Tensor> {
        self.weights.iter().chain(&self.in_place)
    }

    fn dropouts(&self) -> Vec<Option<Dropout>> {
        self.problems.iter().map(|part| part.lora.and_then(|lora| lora.dropout)).collect()
    }

    /// Inputs: x, packed parameters, the residual; placeholders for the latter two.
    pub fn forward(
        &self,
        inputs: [&Tensor; 3],
        residual: bool,
    ) -> Result<(CudaStorage, Shape, Saved)> {
        let dtype = inputs[0].dtype();
        let sum = self.keep && self.activation != Activation::Identity;
        let plan = self.plan(Pass::Forward { residual, sum }, dtype)?;
        let mut dims = self.shape.dims().to_vec();
        if let Some(last) = dims.last_mut() {
            *last = self.problems.iter().map(|part| part.out_dim).sum();
        }
        let shape = Shape::from(dims);
        let low_rank_shape = (plan.saved > 0).then(|| Shape::from(plan.saved));
        let low_rank = low_rank_shape.as_ref().map(|shape| (DType::F32, shape));
        let sum = sum.then_some((dtype, &shape));
        let inputs: Vec<_> = inputs.into_iter().chain(self.captured()).collect();
        let job = Job { op: self.op, plan: &plan, dropouts: &self.dropouts() };
        let outputs = [Some((dtype, &shape)), low_rank, sum];
        let [out, low_rank, sum] = job.run_some(&inputs, outputs)?;
        let Some(out) = out else { bail!("{}: no output", self.op) };
        let low_rank = low_rank.zip(low_rank_shape);
        let low_rank = low_rank.map(|(storage, shape)| driver::tensor(storage, shape));
        let sum = sum.map(|storage| driver::tensor(storage, &shape));
        Ok((out, shape, Saved { low_rank, sum }))
    }

    /// Whether a parameter is trained.
    pub fn is_trained(&self) -> bool {
        self.parameters.iter().any(|parameter| parameter.trained)
    }

    /// The gradients of x, if it is wanted, and of parameters that are an input. A collector gets those that it takes.
    /// Without trained parameters nobody reads x, and any tensor of its dtype may take its place.
    pub fn backward(
        &self,
        [x, parameters]: [&Tensor; 2],
        dx: bool,
        saved: &Saved,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let dparameters = self.is_trained();
        let plan = self.plan(Pass::Backward { dx, parameters: dparameters }, x.dtype())?;
        // Where nothing was kept nobody reads, and the gradient stands in for it.
        let [low_rank, sum] = [&saved.low_rank, &saved.sum].map(|t| t.as_ref().unwrap_or(grad));
        let inputs = [x, parameters, low_rank, sum, grad];
        let inputs: Vec<_> = inputs.into_iter().chain(self.captured()).collect();
        let length = || match &self.collected {
            Some(Collected { tensors, .. }) => tensors.iter().map(Tensor::elem_count).sum(),
            None => parameters.elem_count(),
        };
        let packed = dparameters.then(|| Shape::from(length()));
        let of_parameters = packed.as_ref().map(|shape| (DType::F32, shape));
        let outputs = [dx.then_some((x.dtype(), &self.shape)), of_parameters];
        let job = Job { op: self.op, plan: &plan, dropouts: &self.dropouts() };
        let [of_x, of_parameters] = job.run_to_tensors(&inputs, outputs)?;
        let (Some(collected), Some(all)) = (&self.collected, &of_parameters) else {
            return Ok((of_x, of_parameters));
        };
        let (mut start, mut of_first) = (0, None);
        for tensor in &collected.tensors {
            let gradient = all.narrow(0, start, tensor.elem_count())?.reshape(tensor.shape())?;
            match collected.but_first && start == 0 {
                true => of_first = Some(gradient),
                false => collected.collector.add(tensor, gradient)?,
            }
            start += tensor.elem_count();
        }
        Ok((of_x, of_first))
    }
}
