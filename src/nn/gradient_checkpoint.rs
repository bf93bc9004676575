//! Gradient checkpointing: a module keeps its input alone, and is run once more when its gradients are wanted.
//!
//! ```text
//! forward    y = f(x), and its graph is dropped
//! backward   x' = a variable with the values of x;  f(x') with a graph;  (dx, dp) = gradients of sum(f(x') * dy)
//! ```
//! The graph sees one operation of x and of all trainable parameters, flattened into one tensor. The second run does
//! what the first did, dropout masks included, so the gradients have the bits of those without checkpointing.
//!
//! Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; `torch.utils.checkpoint`.

use super::{trainable_variables, ModuleTree, ENDS_THE_GRAPH};
use candle_core::{bail, CpuStorage, CustomOp2, DType, Device, Layout, Result, Shape, Storage};
use candle_core::{Tensor, Var};
use std::sync::Mutex;

const OP: &str = "gradient-checkpoint";

/// `f(module, x)`, whose intermediates the graph does not keep.
///
/// Where neither `x` nor a parameter has a gradient to come, this is just `f`. On devices other than the CPU and CUDA
/// it is, too.
///
/// # Errors
/// - `f` fails;
/// - `f` depends on a variable that is not in the module's tree, which would get no gradient;
/// - a parameter is computed from a variable, see [`trainable_variables`].
///
/// The backward fails when no gradient reaches a trainable parameter.
pub fn gradient_checkpoint<M>(
    module: &M,
    x: &Tensor,
    f: impl Fn(&M, &Tensor) -> Result<Tensor> + Send + Sync + 'static,
) -> Result<Tensor>
where
    M: ModuleTree + Clone + Send + Sync + 'static,
{
    let parameters = trainable_variables(module)?;
    let supported = matches!(x.device(), Device::Cpu | Device::Cuda(_));
    if !supported || (parameters.is_empty() && !x.track_op()) {
        return f(module, x);
    }
    // With the parameters as they are, so that operations take the paths that they take in the second run; what graph
    // there is goes with the detached value.
    let value = f(module, &x.detach())?;
    let known = |node: &Tensor| parameters.iter().any(|(_, p)| p.id() == node.id());
    if value.sorted_nodes().into_iter().any(|node| node.is_variable() && !known(node)) {
        bail!("{OP}: the module depends on a variable that its tree of parameters does not show")
    }
    // Its storage becomes that of the result, as it is.
    let value = match value.layout().start_offset() {
        0 => value.detach().contiguous()?,
        _ => value.detach().force_contiguous()?,
    };
    let flat = if parameters.is_empty() {
        Tensor::zeros(1, DType::F32, x.device())?
    } else {
        let flat = parameters.iter().map(|(_, p)| p.flatten_all()?.to_dtype(DType::F32));
        Tensor::cat(&flat.collect::<Result<Vec<_>>>()?, 0)?
    };
    let module = module.clone();
    let run = move |x: &Tensor| f(&module, x);
    x.apply_op2(&flat, Recomputed { run, parameters, value: Mutex::new(Some(value)) })
}

/// Inputs: x, the flat parameters.
struct Recomputed<F> {
    run: F,
    parameters: Vec<(String, Var)>,
    /// What the forward gives, once.
    value: Mutex<Option<Tensor>>,
}

impl<F> Recomputed<F> {
    fn take_value(&self) -> Result<Tensor> {
        match self.value.lock().ok().and_then(|mut value| value.take()) {
            Some(value) => Ok(value),
            None => bail!("{OP}: the forward runs once"),
        }
    }
}

impl<F: Fn(&Tensor) -> Result<Tensor>> CustomOp2 for Recomputed<F> {
    fn name(&self) -> &'static str {
        OP
    }

    fn cpu_fwd(
        &self,
        _x: &CpuStorage,
        _x_layout: &Layout,
        _parameters: &CpuStorage,
        _parameters_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let value = self.take_value()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cpu(storage) => Ok((storage.clone(), layout.shape().clone())),
            _ => bail!("{OP}: the module's output left the CPU"),
        }
    }

    #[cfg(feature = "cuda")]
    fn cuda_fwd(
        &self,
        _x: &candle_core::CudaStorage,
        _x_layout: &Layout,
        _parameters: &candle_core::CudaStorage,
        _parameters_layout: &Layout,
    ) -> Result<(candle_core::CudaStorage, Shape)> {
        use candle_core::backend::BackendStorage;
        let value = self.take_value()?;
        let (storage, layout) = value.storage_and_layout();
        match &*storage {
            Storage::Cuda(storage) => Ok((storage.try_clone(layout)?, layout.shape().clone())),
            _ => bail!("{OP}: the module's output left the GPU"),
        }
    }

    fn bwd(
        &self,
        x: &Tensor,
        _parameters: &Tensor,
        _res: &Tensor,
        grad_res: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let input = match x.track_op() {
            true => Var::from_tensor(&x.detach())?.into_inner(),
            false => x.clone(),
        };
        let gradients = ((self.run)(&input)? * grad_res.detach())?.sum_all()?.backward()?;
        let mut flat = Vec::with_capacity(self.parameters.len());
        for (name, parameter) in &self.parameters {
            match gradients.get(parameter) {
                Some(gradient) => flat.push(gradient.flatten_all()?.to_dtype(DType::F32)?),
                None => bail!(
                    "{OP}: the trainable parameter {name} got no gradient; freeze it if the module does not depend \
                     on it, else look for an operation without a backward: {ENDS_THE_GRAPH}"
                ),
            }
        }
        let flat = if flat.is_empty() { None } else { Some(Tensor::cat(&flat, 0)?) };
        Ok((gradients.get(&input).cloned(), flat))
    }
}
