//! A different adapter for each image of a batch, in one call.
//!
//! ```text
//! images  0 1 2 3 4        adapters  a b a __base__ b
//! runs    a: 0 2    b: 1 4    __base__: 3      each through the whole model, then rows back in order
//! ```
//! Every image gets the result that it would get alone, in any model. PEFT's `adapter_names`, which mixes inside each
//! layer, refuses attention over padded windows, DoRA and convolutions. A SAM image is thousands of tokens, so that a
//! run for each adapter costs little more than one for all; docs/log/2026-11-23.md has figures.

use super::switch::{activate, active_adapters, check_known, NO_ADAPTER};
use crate::nn::{ModuleTree, Node};
use crate::{Error, Result};
use candle_core::{Device, Tensor};

/// Calls `forward` once for each adapter named, with that adapter active and the indices (u32, `[n]`) of its images.
/// Puts the outputs, each `[n, ..]`, together in the order of the batch. `adapters` has one name for each image;
/// [`NO_ADAPTER`] is none. The adapters active before are active again afterwards, whatever happens.
///
/// ```no_run
/// # use candle_core::Tensor;
/// # use candle_sam_lora::{lora::{forward_mixed_batch, NO_ADAPTER}, nn::Mode, sam::SamVisionEncoder};
/// # fn f(encoder: &mut SamVisionEncoder, images: &Tensor) -> candle_sam_lora::Result<()> {
/// let embeddings = forward_mixed_batch(encoder, &["cells", NO_ADAPTER, "nuclei"], |encoder, indices| {
///     let x = images.index_select(&indices.to_device(images.device())?, 0)?;
///     Ok(vec![encoder.forward(&x, Mode::Eval)?])
/// })?;
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - no image is named, or a name is that of no adapter;
/// - adapters are merged or disabled;
/// - `forward` fails, or its outputs are not as many or as large as asked for.
pub fn forward_mixed_batch<M: ModuleTree>(
    model: &mut M,
    adapters: &[&str],
    mut forward: impl FnMut(&M, &Tensor) -> Result<Vec<Tensor>>,
) -> Result<Vec<Tensor>> {
    let mut distinct: Vec<&str> = Vec::new();
    for name in adapters {
        if !distinct.contains(name) {
            distinct.push(name);
        }
    }
    let named: Vec<&str> = distinct.iter().copied().filter(|name| *name != NO_ADAPTER).collect();
    check_known(model, &named)?;
    check_usable(model)?;
    let before = active_adapters(model);
    let outputs = distinct
        .iter()
        .map(|name| {
            let images: Vec<u32> =
                (0..).zip(adapters).filter(|(_, own)| *own == name).map(|(i, _)| i).collect();
            let active = if *name == NO_ADAPTER { vec![] } else { vec![name.to_string()] };
            activate(model, &active)?;
            let count = images.len();
            let indices = Tensor::new(images.as_slice(), &Device::Cpu)?;
            Ok((images, check_outputs(name, count, forward(model, &indices)?)?))
        })
        .collect::<Result<Vec<_>>>();
    activate(model, &before)?;
    in_order(adapters.len(), outputs?)
}

fn check_usable(model: &dyn ModuleTree) -> Result<()> {
    let mut problem = None;
    model.visit("", &mut |path, node| {
        let Node::Layer(layer) = node else { return };
        if layer.adapters.unmerged.is_some() {
            problem = Some(format!("the adapters of {path} are merged: unmerge the model first"));
        } else if layer.adapters.disabled && !layer.adapters.is_empty() {
            problem = Some(format!("the adapters of {path} are disabled: enable them first"));
        }
    });
    problem.map_or(Ok(()), |problem| Err(Error::config(problem)))
}

fn check_outputs(adapter: &str, count: usize, outputs: Vec<Tensor>) -> Result<Vec<Tensor>> {
    for output in &outputs {
        if output.dims().first() != Some(&count) {
            return Err(Error::config(format!(
                "forward_mixed_batch: {adapter:?} has {count} images, but an output of shape {:?}",
                output.dims()
            )));
        }
    }
    Ok(outputs)
}

/// The outputs of all runs, rows in the order of the batch.
fn in_order(batch: usize, runs: Vec<(Vec<u32>, Vec<Tensor>)>) -> Result<Vec<Tensor>> {
    let Some((_, first)) = runs.first() else {
        return Err(Error::config("forward_mixed_batch: the batch is empty"));
    };
    if runs.len() == 1 {
        return Ok(first.clone()); // Covers all images, in their order.
    }
    if runs.iter().any(|(_, outputs)| outputs.len() != first.len()) {
        return Err(Error::config("forward_mixed_batch: each call must give as many outputs"));
    }
    let mut row = vec![0u32; batch];
    let images = runs.iter().flat_map(|(images, _)| images);
    for (place, image) in (0..).zip(images) {
        row[*image as usize] = place;
    }
    let row = Tensor::new(row, &Device::Cpu)?;
    (0..first.len())
        .map(|i| {
            let parts: Vec<&Tensor> = runs.iter().map(|(_, outputs)| &outputs[i]).collect();
            Ok(Tensor::cat(&parts, 0)?.index_select(&row.to_device(first[i].device())?, 0)?)
        })
        .collect()
}
