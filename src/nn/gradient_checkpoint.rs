//! Gradient checkpointing: a module keeps its input alone, and is run once more when its gradients are wanted.
//!
//! ```text
//! forward    y = f(x), and its graph is dropped
//! backward   x' = a variable with the values of x;  f(x') with a graph;  (dx, dp) = gradients of f(x') from dy
//! ```
//! The graph sees one operation of x and of all trainable parameters, flattened into one tensor. The second run does
//! what the first did, dropout masks included, so the gradients have the bits of those without checkpointing.
//!
//! Source: Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016; `torch.utils.checkpoint`.

use super::{trainable_variables, ModuleTree, ENDS_THE_GRAPH};
use crate::ops::{self, without_collector, Collector};
use candle_core::backprop::GradStore;
use candle_core::{bail, Device, Result, Tensor, Var};
use std::sync::Arc;

const OP: &str = "gradient-checkpoint";

/// The gradients where that of `y` is `grad`.
fn backward_from(y: &Tensor, grad: Tensor) -> Result<GradStore> {
    let end = Tensor::zeros((), y.dtype(), y.device())?;
    let end = ops::with_backward(OP, (y, None, None), end, move |_, _| {
        Ok((Some(grad.clone()), None, None))
    });
    end?.backward()
}

/// `f(module, x)`, whose intermediates the graph does not keep.
///
/// Where neither `x` nor a parameter has a gradient to come, this is just `f`. On devices other than the CPU and CUDA
/// it is, too.
///
/// ```
/// use candle_core::{DType, Device, Tensor, Var};
/// use candle_sam_lora::nn::{gradient_checkpoint, Linear, Mode};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let weight = Var::ones((2, 3), DType::F32, &Device::Cpu)?;
/// let layer = Linear::new(weight.as_tensor().clone(), None);
/// let x = Tensor::ones((1, 3), DType::F32, &Device::Cpu)?;
/// // The backward runs the closure again, because the graph keeps no result inside it.
/// let y = gradient_checkpoint(&layer, &x, |layer, x| layer.forward(x, Mode::Eval)?.sqr())?;
/// let gradients = y.sum_all()?.backward()?;
/// assert_eq!(gradients.get(&weight).unwrap().to_vec2::<f32>()?, [[6.0; 3]; 2]);
/// # Ok(())
/// # }
/// ```
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
    // With the parameters as they are, so that operations take the paths that they take in the second run. Any graph
    // goes with the detached value.
    let value = without_collector(|| f(module, &x.detach()))?;
    let known = |node: &Tensor| parameters.iter().any(|(_, p)| p.id() == node.id());
    if value.sorted_nodes().into_iter().any(|node| node.is_variable() && !known(node)) {
        bail!("{OP}: the module depends on a variable that its tree of parameters does not show")
    }
    let value = value.detach();
    // With an open collector, the graph need not know of the parameters.
    let takes_all = |c: &Arc<Collector>| x.track_op() && parameters.iter().all(|(_, p)| c.takes(p));
    let collector = Collector::open().filter(takes_all);
    let pack = || ops::pack(parameters.iter().map(|(_, p)| p.as_tensor()), x.device());
    let flat = collector.is_none().then(pack).transpose()?;
    let module = module.clone();
    ops::with_backward(OP, (x, flat.as_ref(), None), value, move |[x, ..], grad| {
        let input = match x.track_op() {
            true => Var::from_tensor(&x.detach())?.into_inner(),
            false => x.clone(),
        };
        let own = Collector::of(parameters.iter().map(|(_, p)| p.as_tensor()));
        let again = own.during(|| f(&module, &input))?;
        let gradients = backward_from(&again, grad.detach())?;
        let mut of_parameters = Vec::with_capacity(parameters.len());
        for (name, parameter) in &parameters {
            match (own.total(parameter, gradients.get(parameter))?, &collector) {
                (Some(gradient), Some(collector)) => collector.add(parameter, gradient)?,
                (Some(gradient), None) => of_parameters.push(gradient),
                (None, _) => bail!(
                    "{OP}: the trainable parameter {name} got no gradient; freeze it if the module does not depend \
                     on it, else look for an operation without a backward: {ENDS_THE_GRAPH}"
                ),
            }
        }
        let any = !of_parameters.is_empty();
        let flat = any.then(|| ops::pack(&of_parameters, x.device())).transpose()?;
        Ok((gradients.get(&input).cloned(), flat, None))
    })
}
