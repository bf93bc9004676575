//! Which image encoder and which adapters compute an embedding, as checksums.

use super::SamModel;
use crate::files::Checksum;
use crate::nn::{is_adapter_tensor, ModuleTree, Node};
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use safetensors::View;

/// Checksums of an image encoder.
#[derive(Clone, Debug)]
pub(super) struct Identity {
    /// Checksum of the configuration and of every tensor but those of adapters.
    pub model: String,
    /// Checksum of the active adapters: names, scalings, tensors; none without any in use.
    pub adapter: Option<String>,
    /// Whether a step of training would change it.
    pub is_trainable: bool,
}

/// The identity of a model's image encoder.
///
/// # Errors
/// - a tensor cannot be read from its device.
pub(super) fn identity(model: &SamModel) -> Result<Identity> {
    let config = serde_json::to_vec(&model.config().vision_config).map_err(|e| {
        Error::Config(format!("the vision encoder's configuration cannot be serialized: {e}"))
    })?;
    let (mut base, mut adapter) = (Checksum::new(), Checksum::new());
    base.add("config", &config);
    let (mut is_adapted, mut is_trainable, mut failed) = (false, false, None);
    model.vision_encoder.visit("", &mut |name, node| match node {
        Node::Parameter(tensor) | Node::Buffer(tensor) => {
            is_trainable |= tensor.track_op();
            if !is_adapter_tensor(name) {
                failed = failed.take().or(add(&mut base, name, tensor).err());
            }
        }
        Node::Layer(layer) if layer.adapters.disabled || layer.adapters.unmerged.is_some() => {}
        Node::Layer(layer) => {
            for (own, active) in layer.adapters.activated() {
                is_adapted = true;
                let scaling = active.scaling.to_le_bytes();
                adapter.add(&format!("{name} {own}"), &scaling);
                for (leaf, tensor) in active.tensors() {
                    failed = failed.take().or(add(&mut adapter, leaf, tensor).err());
                }
            }
        }
        Node::Fixed | Node::Tied(_) => {}
    });
    match failed {
        Some(error) => Err(error.into()),
        None => Ok(Identity {
            model: base.to_string(),
            adapter: is_adapted.then(|| adapter.to_string()),
            is_trainable,
        }),
    }
}

fn add(checksum: &mut Checksum, name: &str, tensor: &Tensor) -> candle_core::Result<()> {
    let tensor = tensor.to_device(&Device::Cpu)?;
    checksum.add(&format!("{name} {:?} {:?}", tensor.dtype(), tensor.dims()), &View::data(&tensor));
    Ok(())
}
