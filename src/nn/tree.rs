//! A model as a tree of named tensors, the way PyTorch's `named_parameters` shows one.
//!
//! Checkpoints, LoRA injection, optimizers and reports all work on this view. They walk the tree and see each tensor,
//! and each [`Layer`] that can be adapted, with its dotted name. A layer takes part by listing its children once, with
//! [`module_tree!`](crate::module_tree), under the names its checkpoint uses.

use super::variables::Training;
use super::{adapter_tensor_name, Adapters};
use crate::{Error, Result};
use candle_core::{DType, Tensor, TensorId, Var};
use std::collections::{BTreeMap, HashMap, HashSet};

/// A node that a walk meets.
///
/// [Example](crate::nn::ModuleTree)
#[derive(Debug)]
pub enum Node<'a> {
    /// A parameter; trainable if [`Tensor::track_op`], see [`trainable_variables`].
    Parameter(&'a Tensor),
    /// A tensor that is saved with the model but never trained nor counted.
    Buffer(&'a Tensor),
    /// Says that the tensor of this name, met next, is a [`Fixed`] parameter. It is met as a buffer, and as
    /// a parameter once an adapter trains it.
    Fixed,
    /// A [`Tied`](super::Tied) parameter without a value of its own, and the name of the tensor whose value it has,
    /// below the nearest module around both.
    Tied(&'static str),
    /// A layer that can be adapted, met before its own parameters.
    Layer(Layer<'a>),
}

/// A parameter that is neither trained nor counted, unless an adapter saves its module. A constant shows as a buffer; a
/// variable and a view of one show as a parameter.
///
/// [Example](crate::nn::ModuleTree)
#[derive(Clone, Debug)]
pub struct Fixed(pub Tensor);

/// A node that a mutable walk meets; see [`Node`].
///
/// [Example](crate::nn::ModuleTree)
#[derive(Debug)]
pub enum NodeMut<'a> {
    /// A parameter.
    Parameter(&'a mut Tensor),
    /// A tensor that is saved with the model but never trained nor counted.
    Buffer(&'a mut Tensor),
    /// Where a [`Tied`](super::Tied) parameter can get a value of its own; met only while it has none.
    Tied(&'a mut Option<Fixed>),
    /// A layer that can be adapted, met before its own parameters.
    Layer(LayerMut<'a>),
}

/// A layer that can be adapted: a [`Linear`](super::Linear), or a [`Conv2d`](super::Conv2d) where the weight has four
/// dimensions.
///
/// [Example](crate::nn::ModuleTree)
#[derive(Clone, Copy, Debug)]
pub struct Layer<'a> {
    /// `[out, in]` or `[out, in, k, k]`
    pub weight: &'a Tensor,
    /// `[out]`
    pub bias: Option<&'a Tensor>,
    /// By name.
    pub adapters: &'a Adapters,
}

/// A [`Layer`] to change.
///
/// [Example](crate::nn::ModuleTree)
#[derive(Debug)]
pub struct LayerMut<'a> {
    /// `[out, in]` or `[out, in, k, k]`
    pub weight: &'a mut Tensor,
    /// Place of the scales of a weight in int8; none where the layer cannot have one.
    pub scales: Option<&'a mut Option<Tensor>>,
    /// `[out]`
    pub bias: &'a mut Option<Tensor>,
    /// By name.
    pub adapters: &'a mut Adapters,
}

/// The nodes of a layer: itself, its parameters, those of its adapters.
pub(super) fn visit_layer(
    path: &str,
    weight: &Tensor,
    bias: Option<&Tensor>,
    adapters: &Adapters,
    f: &mut dyn FnMut(&str, Node<'_>),
) {
    f(path, Node::Layer(Layer { weight, bias, adapters }));
    f(&join(path, "weight"), Node::Parameter(weight));
    if let Some(bias) = bias {
        f(&join(path, "bias"), Node::Parameter(bias));
    }
    for (name, adapter) in adapters.iter() {
        for (leaf, tensor) in adapter.tensors() {
            f(&adapter_tensor_name(path, name, leaf), Node::Parameter(tensor));
        }
    }
}

impl LayerMut<'_> {
    /// As [`visit_layer`].
    pub(super) fn visit(
        self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        let Self { weight, scales, bias, adapters } = self;
        f(path, NodeMut::Layer(LayerMut { weight, scales, bias, adapters }))?;
        f(&join(path, "weight"), NodeMut::Parameter(weight))?;
        if let Some(bias) = bias {
            f(&join(path, "bias"), NodeMut::Parameter(bias))?;
        }
        for (name, adapter) in adapters.iter_mut() {
            for (leaf, tensor) in adapter.tensors_mut() {
                f(&adapter_tensor_name(path, name, leaf), NodeMut::Parameter(tensor))?;
            }
        }
        Ok(())
    }
}

/// A tree of named tensors.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::module_tree;
/// use candle_sam_lora::nn::{Buffer, Linear, ModuleTree, Node};
///
/// struct Head {
///     mean: Buffer,
///     project: Linear,
/// }
/// module_tree!(Head { mean, project });
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let project = Linear::new(Tensor::ones((3, 4), DType::F32, &Device::Cpu)?, None);
/// let head = Head { mean: Buffer(Tensor::zeros(4, DType::F32, &Device::Cpu)?), project };
/// let mut seen = Vec::new();
/// head.visit("", &mut |name, node| match node {
///     Node::Parameter(_) => seen.push(format!("parameter {name}")),
///     Node::Buffer(_) => seen.push(format!("buffer {name}")),
///     Node::Layer(_) => seen.push(format!("layer {name}")),
///     _ => {}
/// });
/// assert_eq!(seen, ["buffer mean", "layer project", "parameter project.weight"]);
/// # Ok(())
/// # }
/// ```
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no tree of named tensors",
    note = "implement it for a struct of yours by naming the fields that hold parameters: `candle_sam_lora::module_tree!(MyLayer {{ qkv, norm }})`",
    note = "in the place of candle_nn's layers take `nn::Linear`, `nn::Conv2d`, `nn::Embedding` and `nn::LayerNorm`, which LoRA can adapt; leave out fields without parameters"
)]
pub trait ModuleTree {
    /// Calls `f` with every node below `path`, in checkpoint order.
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>));

    /// As [`visit`](Self::visit), with leave to change the nodes; stops at the first error.
    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()>;
}

/// `path.name`, or `name` at the root.
///
/// [Example](crate::nn::ModuleTree)
pub fn join(path: &str, name: &str) -> String {
    if path.is_empty() {
        name.to_string()
    } else {
        format!("{path}.{name}")
    }
}

/// Implements [`ModuleTree`] for a struct by naming its fields: `module_tree!(Mlp { lin1, lin2 })`. A field
/// whose checkpoint name is no Rust identifier gives it after an arrow: `{ layers => "0.layers" }`; an empty
/// name adds no path component.
///
/// [Example](crate::nn)
#[macro_export]
macro_rules! module_tree {
    (@name $field:ident) => { stringify!($field) };
    (@name $field:ident $name:literal) => { $name };
    ($module:ty { $($field:ident $(=> $name:literal)?),* $(,)? }) => {
        impl $crate::nn::ModuleTree for $module {
            #[allow(unused_variables)]
            fn visit(&self, path: &str, f: &mut dyn FnMut(&str, $crate::nn::Node<'_>)) {
                $($crate::nn::ModuleTree::visit(
                    &self.$field,
                    &$crate::nn::child(path, $crate::module_tree!(@name $field $($name)?)),
                    f,
                );)*
            }

            #[allow(unused_variables)]
            fn visit_mut(
                &mut self,
                path: &str,
                f: &mut dyn FnMut(&str, $crate::nn::NodeMut<'_>) -> $crate::Result<()>,
            ) -> $crate::Result<()> {
                $($crate::nn::ModuleTree::visit_mut(
                    &mut self.$field,
                    &$crate::nn::child(path, $crate::module_tree!(@name $field $($name)?)),
                    f,
                )?;)*
                Ok(())
            }
        }
    };
}

/// The path of a child; an empty name adds no component. Used by [`module_tree!`](crate::module_tree).
///
/// [Example](crate::nn::ModuleTree)
pub fn child(path: &str, name: &str) -> String {
    if name.is_empty() {
        path.to_string()
    } else {
        join(path, name)
    }
}

impl ModuleTree for Tensor {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        f(path, Node::Parameter(self))
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        f(path, NodeMut::Parameter(self))
    }
}

/// A tensor that belongs to the checkpoint but is never trained nor counted.
///
/// [Example](crate::nn::ModuleTree)
#[derive(Clone, Debug)]
pub struct Buffer(pub Tensor);

impl ModuleTree for Buffer {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        f(path, Node::Buffer(&self.0))
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        f(path, NodeMut::Buffer(&mut self.0))
    }
}

impl<T: ModuleTree> ModuleTree for Option<T> {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        if let Some(module) = self {
            module.visit(path, f)
        }
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        self.as_mut().map_or(Ok(()), |module| module.visit_mut(path, f))
    }
}

/// The elements are named by their index.
impl<T: ModuleTree> ModuleTree for Vec<T> {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        for (index, module) in self.iter().enumerate() {
            module.visit(&join(path, &index.to_string()), f)
        }
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        for (index, module) in self.iter_mut().enumerate() {
            module.visit_mut(&join(path, &index.to_string()), f)?
        }
        Ok(())
    }
}

impl<T: ModuleTree + ?Sized> ModuleTree for Box<T> {
    fn visit(&self, path: &str, f: &mut dyn FnMut(&str, Node<'_>)) {
        self.as_ref().visit(path, f)
    }

    fn visit_mut(
        &mut self,
        path: &str,
        f: &mut dyn FnMut(&str, NodeMut<'_>) -> Result<()>,
    ) -> Result<()> {
        self.as_mut().visit_mut(path, f)
    }
}

/// Every parameter with its name, adapters included, in checkpoint order. Buffers are left out.
///
/// [Example](crate::nn)
pub fn named_parameters(module: &dyn ModuleTree) -> Vec<(String, Tensor)> {
    let mut parameters = Vec::new();
    module.visit("", &mut |name, node| {
        if let Node::Parameter(tensor) = node {
            parameters.push((name.to_string(), tensor.clone()));
        }
    });
    parameters
}

/// Fails where two tensors of a tree have one name. Whoever walks by names would read or change one of them alone.
pub(crate) fn refuse_twins(module: &dyn ModuleTree) -> Result<()> {
    let (mut names, mut twin) = (HashSet::new(), None);
    module.visit("", &mut |name, node| {
        if let Node::Parameter(_) | Node::Buffer(_) = node {
            if !names.insert(name.to_string()) {
                twin.get_or_insert_with(|| name.to_string());
            }
        }
    });
    match twin {
        Some(name) => Err(Error::config(format!(
            "two tensors of the model are called {name:?}: give them names of their own, or list a shared one once"
        ))),
        None => Ok(()),
    }
}

/// Fails where a layer has a merged adapter: unmerging would undo whatever is done to its weight until then.
pub(crate) fn refuse_merged(model: &dyn ModuleTree) -> Result<()> {
    let mut merged = None;
    model.visit("", &mut |path, node| {
        if let Node::Layer(layer) = node {
            if layer.adapters.unmerged.is_some() {
                merged.get_or_insert_with(|| path.to_string());
            }
        }
    });
    merged.map_or(Ok(()), |path| {
        Err(Error::config(format!("the adapter of {path} is merged: unmerge the model first")))
    })
}

/// The variables behind the trainable parameters, for an optimizer to update in place, by the parameters' names.
///
/// A parameter may be a view of a variable, as q, k and v are of a fused `qkv`. The variable behind it is trained
/// whole. Parameters that share one variable give it once, under their names joined by `+`.
///
/// [Example](crate::nn)
///
/// # Errors
/// When a parameter is computed from a variable, as by a cast: a step would not change it.
pub fn trainable_variables(module: &dyn ModuleTree) -> Result<Vec<(String, Var)>> {
    let mut variables: Vec<(String, Var)> = Vec::new();
    for (name, tensor) in named_parameters(module) {
        let Some(variable) = Training::variable(&name, &tensor)? else { continue };
        match variables.iter_mut().find(|(_, known)| known.id() == variable.id()) {
            Some((names, _)) => *names = format!("{names}+{name}"),
            None => variables.push((name, variable)),
        }
    }
    Ok(variables)
}

/// A copy that shares every value and has no variables: its forward keeps no graph, so it takes the memory of an
/// inference. It sees what an optimizer changes later, and what [`set_trainable`] and adapters' injection change it
/// does not.
///
/// ```
/// use candle_core::{Device, Tensor, Var};
/// use candle_sam_lora::nn::{without_gradients, Linear, Mode};
///
/// # fn main() -> candle_core::Result<()> {
/// let weight = Var::ones((2, 3), candle_core::DType::F32, &Device::Cpu)?;
/// let layer = Linear::new(weight.as_tensor().clone(), None);
/// let copy = without_gradients(&layer).map_err(candle_core::Error::wrap)?;
/// let x = Tensor::ones((1, 3), candle_core::DType::F32, &Device::Cpu)?;
/// assert!(layer.forward(&x, Mode::Eval)?.track_op());
/// assert!(!copy.forward(&x, Mode::Eval)?.track_op());
///
/// weight.set(&weight.affine(2.0, 0.0)?)?; // as an optimizer does
/// assert_eq!(copy.forward(&x, Mode::Eval)?.to_vec2::<f32>()?, [[6.0, 6.0]]);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - a module of the tree refuses a change.
pub fn without_gradients<M: ModuleTree + Clone>(module: &M) -> Result<M> {
    let mut copy = module.clone();
    copy.visit_mut("", &mut |_, node| {
        if let NodeMut::Parameter(tensor) = node {
            *tensor = tensor.detach();
        }
        Ok(())
    })?;
    Ok(copy)
}

/// The weights and biases that unmerging replaces.
fn merged_tensors(module: &dyn ModuleTree) -> HashSet<TensorId> {
    let mut merged = HashSet::new();
    module.visit("", &mut |_, node| {
        let Node::Layer(layer) = node else { return };
        let Some(old) = &layer.adapters.unmerged else { return };
        let kept = [Some(&old.weight), old.bias.as_ref()].map(|tensor| tensor.map(Tensor::id));
        let now = [Some(layer.weight), layer.bias].map(|tensor| tensor.map(Tensor::id));
        merged.extend(now.into_iter().flatten().filter(|id| !kept.contains(&Some(*id))));
    });
    merged
}

/// Makes each parameter trainable or frozen as `wanted` says of its name.
///
/// A parameter that is trainable already keeps its variable, which a `VarMap` may hold too. One that was frozen becomes
/// a new variable with a copy of its values, because candle cannot make a tensor a variable in place. So does one that
/// is computed from a variable, or that shares its variable with a parameter to be frozen. Parameters that are one
/// tensor become one variable.
///
/// [Example](crate::nn)
///
/// # Errors
/// - a parameter to be trained is in int8;
/// - a layer whose weight is to be trained has a merged adapter: unmerging would take the trained weight away;
/// - a tensor cannot be allocated.
pub fn set_trainable(
    module: &mut dyn ModuleTree,
    mut wanted: impl FnMut(&str) -> bool,
) -> Result<()> {
    let mut choices = BTreeMap::new();
    let mut frozen = HashSet::new();
    let merged = merged_tensors(module);
    for (name, tensor) in named_parameters(module) {
        let train = wanted(&name);
        if train && tensor.dtype() == DType::U8 {
            return Err(Error::config(format!("{name} is in int8 and cannot be trained")));
        }
        if train && merged.contains(&tensor.id()) {
            let message = format!("{name} has a merged adapter: unmerge the model first");
            return Err(Error::config(message));
        }
        if let (false, Training::Trained(variable)) = (train, Training::of(&tensor)?) {
            frozen.insert(variable.id());
        }
        choices.insert(name, train);
    }
    let mut made: HashMap<TensorId, Tensor> = HashMap::new();
    module.visit_mut("", &mut |name, node| {
        let NodeMut::Parameter(tensor) = node else { return Ok(()) };
        match (choices.get(name), Training::of(tensor)?) {
            (Some(true), Training::Trained(variable)) if !frozen.contains(&variable.id()) => {}
            (Some(true), _) => {
                let tied = made.get(&tensor.id()).cloned();
                let new = match tied {
                    Some(variable) => variable,
                    None => Var::from_tensor(&tensor.detach())?.into_inner(),
                };
                made.insert(tensor.id(), new.clone());
                *tensor = new;
            }
            _ => *tensor = tensor.detach(),
        }
        Ok(())
    })
}
