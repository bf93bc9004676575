//! Cellpose-SAM: SAM's image encoder with small patches and global attention, read out as a flow field.
//!
//! ```text
//! x      = encoder(pixel_values)                [B, h, w, C]     tables of relative positions resized to the grid
//! flows  = W2^T out(x)                          [B, 3, S, S]     W2 puts 3 p p channels into blocks of p x p pixels
//! labels = dynamics(flows)                      pixels that flow to one place are one cell
//! ```
//! The three channels are the flow down, the flow to the right and the logit of the cell probability.
//!
//! Source: `vit.py` (`CPSAM`), `core.py`, `transforms.py`, `dynamics.py` of Cellpose 4.2; Pachitariu et al.,
//! "Cellpose-SAM: superhuman generalization for cellular segmentation", 2025.

mod consistency;
mod dynamics;
mod flows;
#[cfg(feature = "images")]
mod normalize;
mod regions;
mod tiles;

pub use dynamics::CellDynamics;
pub use flows::CellFlows;
#[cfg(feature = "images")]
pub use normalize::normalized_image;

use super::{
    checkpoint, AttentionKind, LayerContext, SamConfig, SamVisionAttention,
    SamVisionAttentionSplit, SamVisionConfig, SamVisionEncoder, VisionAttention,
};
use crate::nn::{self, module_in_evaluation, Buffer, Conv2d, ConvTranspose2d, Mode};
use crate::ops::Activation;
use crate::{hub, module_tree, Result};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use std::path::Path;

/// Channels of the readout: two of the flow, one of the cell probability.
const OUTPUTS: usize = 3;

/// Cellpose-SAM's network. Names are those of its checkpoints, in the encoder those of a SAM's image encoder. A clone
/// shares its tensors.
///
/// ```no_run
/// use candle_core::{DType, Device};
/// use candle_sam_lora::sam::{normalized_image, read_image, save_labels, AttentionKind, CellDynamics, CellposeSam};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let model = CellposeSam::from_pretrained("cpsam_v2", AttentionKind::Fused, DType::F32, &Device::Cpu)?;
/// let image = read_image("cells.png")?;
/// let flows = model.flows(&normalized_image(&image)?)?;
/// let labels = CellDynamics::default().labels(&flows)?;
/// save_labels("cells.labels.png", &labels, (image.height(), image.width()))?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct CellposeSam {
    /// SAM's encoder, global attention in every layer.
    pub encoder: SamVisionEncoder,
    /// `C -> 3 p p`, 1x1
    pub out: Conv2d,
    /// `[3 p p, 3, p, p]`, never trained.
    pub readout: Buffer,
}

module_tree!(CellposeSam { encoder, out, readout => "W2" });

module_in_evaluation! {
    /// `[B, channels, S, S] -> [B, 3, S, S]` in evaluation.
    CellposeSam,
}

impl CellposeSam {
    /// The network in a checkpoint of Cellpose 4, such as `~/.cellpose/models/cpsam_v2`: ViT-L, patches of 8 pixels,
    /// images of 256.
    ///
    /// # Errors
    /// - there is no such path, and the hub does not give it;
    /// - as [`nn::checkpoint::load`].
    pub fn from_pretrained(
        name: impl AsRef<Path>,
        kind: AttentionKind,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let sam = SamConfig::vit_l().vision_config;
        let mut model = Self::new(&sam, [256, 8], kind, VarBuilder::zeros(dtype, device))?;
        nn::checkpoint::load(&mut model, hub::folder(name)?, &checkpoint::CELLPOSE_SAM)?;
        Ok(model)
    }

    /// With the tensors of a `VarBuilder`. `sam` is the SAM whose tables the network has; the sides of the image and of
    /// a patch are its own.
    ///
    /// # Errors
    /// - as [`SamVisionEncoder::new`].
    pub fn new(
        sam: &SamVisionConfig,
        [image_size, patch_size]: [usize; 2],
        kind: AttentionKind,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let config = SamVisionConfig { image_size, patch_size, ..sam.clone() };
        let channels = OUTPUTS * patch_size * patch_size;
        let encoder = SamVisionEncoder::with_attention(&config, vb.pp("encoder"), |layer| {
            // The tables are those of SAM's windows and grid.
            global_attention(kind, &LayerContext { config: sam, ..layer.clone() })
        })?;
        let out = Conv2d::load(config.output_channels, channels, 1, 1, vb.pp("out"))?;
        let readout = vb.get((channels, OUTPUTS, patch_size, patch_size), "W2")?;
        Ok(Self { encoder, out, readout: Buffer(readout) })
    }

    /// `[B, channels, S, S] -> [B, 3, S, S]`: flow down, flow to the right, logit of the cell probability.
    ///
    /// # Errors
    /// - `pixel_values` has another shape.
    pub fn forward(&self, pixel_values: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let x = self.encoder.forward(pixel_values, mode)?.permute((0, 2, 3, 1))?;
        let x = self.out.forward(&x, mode)?;
        let weight = self.readout.0.clone();
        let bias = Tensor::zeros(OUTPUTS, weight.dtype(), weight.device())?;
        let blocks = ConvTranspose2d { weight, bias };
        blocks.forward(&x, Activation::Identity)?.permute((0, 3, 1, 2))
    }
}

/// The attention of a layer whose tables may be a window's, over the whole grid.
fn global_attention(
    kind: AttentionKind,
    layer: &LayerContext<'_>,
) -> candle_core::Result<Box<dyn VisionAttention>> {
    Ok(match kind {
        AttentionKind::Fused => {
            let mut attention = SamVisionAttention::new(layer)?;
            attention.core.window = None;
            Box::new(attention)
        }
        AttentionKind::Split => {
            let mut attention = SamVisionAttentionSplit::new(layer)?;
            attention.core.window = None;
            Box::new(attention)
        }
    })
}
