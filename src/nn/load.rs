//! A module filled from a `VarBuilder`.

use super::adapters::is_adapter_tensor;
use super::int8::refuse_int8;
use super::tree::refuse_twins;
use super::{ModuleTree, Node, NodeMut};
use crate::{Error, Result, TensorMismatch};
use candle_nn::VarBuilder;
use std::collections::HashMap;

/// Puts the tensors of a `VarBuilder` into a module, by name, in the builder's dtype and on its device. A `VarMap`
/// keeps the dtype of its variables.
///
/// The module's parameters become the builder's tensors: with a `VarMap` behind it, the map's variables. The names are
/// those of [`named_parameters`](super::named_parameters); `vb.pp("..")` puts a prefix before them. Adapters stay as
/// they are, and must not be merged.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::{VarBuilder, VarMap};
/// use candle_sam_lora::{nn::{load, trainable_variables, MlpBlock, Mode}, ops::Activation};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let map = VarMap::new();
/// let vb = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu).pp("mlp");
/// let first = MlpBlock::load(8, 32, Activation::Gelu, vb.clone())?; // the map makes its variables
/// let mut second = MlpBlock::load(8, 32, Activation::Gelu, VarBuilder::zeros(DType::F32, &Device::Cpu))?;
/// load(&mut second, &vb)?;
/// assert_eq!(trainable_variables(&second)?.len(), map.all_vars().len());
/// let x = Tensor::ones((2, 8), DType::F32, &Device::Cpu)?;
/// let mode = Mode::Train { seed: 1 }; // the seed is for adapters with dropout
/// assert_eq!(first.forward(&x, mode)?.to_vec2::<f32>()?, second.forward(&x, mode)?.to_vec2::<f32>()?);
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - a parameter or buffer of the module is missing, or has another shape: all of them are listed;
/// - a tensor cannot be read;
/// - an adapter is merged;
/// - a weight is in int8;
/// - two tensors of the module have one name.
///
/// The module and the map are unchanged then.
pub fn load(module: &mut dyn ModuleTree, vb: &VarBuilder<'_>) -> Result<()> {
    let source = match vb.prefix() {
        prefix if prefix.is_empty() => "VarBuilder".to_string(),
        prefix => format!("VarBuilder at {prefix}"),
    };
    refuse_int8(module, "loaded anew")?;
    refuse_twins(module)?;
    let mut mismatch = TensorMismatch { source, ..Default::default() };
    let (mut values, mut refused, mut merged) = (HashMap::new(), String::new(), None);
    module.visit("", &mut |name, node| {
        let wanted = match node {
            Node::Parameter(wanted) | Node::Buffer(wanted) if !is_adapter_tensor(name) => wanted,
            Node::Layer(layer) if layer.adapters.unmerged.is_some() => {
                merged.get_or_insert(name.to_string());
                return;
            }
            _ => return,
        };
        // `get` would let a map make it.
        if !vb.contains_tensor(name) {
            return mismatch.missing.push(name.to_string());
        }
        // A map has no `get_unchecked`, and says in the error of `get` which shape it has.
        let unchecked = vb.get_unchecked_dtype(name, vb.dtype());
        match unchecked.or_else(|_| vb.get(wanted.shape(), name)) {
            Ok(value) if value.shape() == wanted.shape() => {
                values.insert(name.to_string(), value);
            }
            Ok(value) => {
                let (expected, found) = (wanted.dims().to_vec(), value.dims().to_vec());
                mismatch.misshaped.push((name.to_string(), expected, found));
            }
            Err(error) => refused += &format!("\n  {name}: {error}"),
        }
    });
    if let Some(name) = merged {
        let message = "has a merged adapter; unmerge it before loading other weights";
        return Err(Error::config(format!("{name} {message}")));
    }
    if !refused.is_empty() {
        return Err(candle_core::Error::msg(format!("{mismatch}{refused}")).into());
    }
    if !mismatch.is_empty() {
        return Err(Error::Mismatch(mismatch.into()));
    }
    module.visit_mut("", &mut |name, node| {
        if let NodeMut::Parameter(tensor) | NodeMut::Buffer(tensor) = node {
            if let Some(value) = values.remove(name) {
                *tensor = value;
            }
        }
        Ok(())
    })
}
