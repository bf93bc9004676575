//! The SAM of DeepSeek-OCR and Unlimited-OCR: SAM's image encoder, made to take images of several sizes and to give
//! fewer, wider tokens.
//!
//! ```text
//! x = patch_embed(pixel_values) + bicubic(pos_embed)         [B, h, h, C]      any h; 32, 40, 64, 80 in use
//! x = neck(layers(x))                                        [B, h, h, 256]    tables resized linearly
//! image_embeddings = net_3(net_2(x))                         [B, 1024, h/4, h/4]
//! ```
//! `net_2` and `net_3` are 3x3 convolutions of stride 2 without bias or activation, one after the other.
//!
//! Source: `ImageEncoderViT` in `deepencoder.py` of DeepSeek-OCR (`deepencoderv2.py` of DeepSeek-OCR-2, whose `net_3`
//! is 896 wide); `UnlimitedOcrSamVisionEncoder` in `modeling_unlimited_ocr.py`.

use super::checkpoint;
use super::{AttentionKind, LayerContext, SamVisionConfig, SamVisionEncoder, VisionAttention};
use crate::module_tree;
use crate::nn::{self, module_in_evaluation, Conv2d, Mode};
use crate::ops::{broadcast_add, resize_bicubic};
use crate::{hub, Error, Result};
use candle_core::{bail, DType, Device, Tensor};
use candle_nn::VarBuilder;
use std::path::Path;

/// The image encoder of DeepSeek-OCR. Its names are those of a SAM's image encoder, so adapters and
/// [`checkpoint::load`] take it as one.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_nn::VarBuilder;
/// use candle_sam_lora::nn::Mode;
/// use candle_sam_lora::sam::{AttentionKind::Fused, DeepSeekOcrEncoder, GotOcr2Encoder, SamConfig};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// // The default configuration, and the widths [512, 1024] and 1024, are the published models'.
/// let config = SamConfig::load("assets/tiny-sam/config.json")?.vision_config;
/// let zeros = VarBuilder::zeros(DType::F32, &Device::Cpu);
/// let page = Tensor::zeros((1, 3, 128, 128), DType::F32, &Device::Cpu)?;
/// let deepseek = DeepSeekOcrEncoder::new(&config, [64, 128], Fused, zeros.clone())?;
/// assert_eq!(deepseek.forward(&page, Mode::Eval)?.dims(), [1, 128, 4, 4]);
/// let got = GotOcr2Encoder::new(&config, 64, Fused, zeros)?;
/// assert_eq!(got.forward(&page, Mode::Eval)?.dims(), [1, 4 * 4, 64]); // tokens
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct DeepSeekOcrEncoder {
    /// SAM's encoder.
    pub sam: SamVisionEncoder,
    /// `output_channels -> 512` of half the side.
    pub net_2: Conv2d,
    /// `512 -> 1024` of half the side.
    pub net_3: Conv2d,
}

module_tree!(DeepSeekOcrEncoder { sam => "", net_2, net_3 });

module_in_evaluation! {
    /// `[B, channels, S, S] -> [B, 1024, h / 4, h / 4]` in evaluation.
    DeepSeekOcrEncoder,
}

impl DeepSeekOcrEncoder {
    /// With the tensors of a `VarBuilder`; `VarBuilder::zeros` gives an encoder to be filled.
    ///
    /// `widths` are those of `net_2` and `net_3`. DeepSeek-OCR has SAM ViT-B's encoder, the default configuration, and
    /// `[512, 1024]`.
    ///
    /// # Errors
    /// - a width is 0;
    /// - as [`SamVisionEncoder::new`].
    pub fn new(
        config: &SamVisionConfig,
        widths: [usize; 2],
        kind: AttentionKind,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        Self::with_attention(config, widths, vb, |layer| kind.build(layer))
    }

    /// As `new`, with the attention that `build` makes for each layer.
    ///
    /// # Errors
    /// As `new`; besides when `build` fails.
    pub fn with_attention(
        config: &SamVisionConfig,
        [width_2, width_3]: [usize; 2],
        vb: VarBuilder<'_>,
        build: impl FnMut(&LayerContext<'_>) -> candle_core::Result<Box<dyn VisionAttention>>,
    ) -> Result<Self> {
        for (name, width) in [("net_2", width_2), ("net_3", width_3)] {
            if width == 0 {
                return Err(Error::config(format!(
                    "deepseek-ocr: the width of {name} is 0, expected 1 or more"
                )));
            }
        }
        config.validate()?;
        let halving = |from, to, name| Conv2d::load_no_bias(from, to, 3, 2, vb.pp(name));
        Ok(Self {
            sam: SamVisionEncoder::with_attention(config, vb.clone(), build)?,
            net_2: halving(config.output_channels, width_2, "net_2")?,
            net_3: halving(width_2, width_3, "net_3")?,
        })
    }

    /// The encoder in a checkpoint of DeepSeek-OCR or Unlimited-OCR: a file, a folder, or a name on the Hugging Face
    /// hub (feature `hub`). The names in it are the makers' or transformers'. `net_2` and `net_3` get the widths that
    /// they have there; the rest of the checkpoint is left alone.
    ///
    /// # Errors
    /// - there is no such path, and the hub does not give it;
    /// - as [`checkpoint::load`].
    pub fn from_pretrained(
        name: impl AsRef<Path>,
        kind: AttentionKind,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        /// Far above any real width, far below an allocation that hurts.
        const WIDEST: usize = 1 << 13;
        let path = hub::folder(name)?;
        let path = path.as_path();
        let width = |name: &str, in_transformers: &str| {
            let shape = nn::checkpoint::shape_of;
            let shape = shape(path, name).or_else(|e| shape(path, in_transformers).map_err(|_| e));
            match shape?[..] {
                [width @ 1..=WIDEST, _, 3, 3] => Ok(width),
                ref other => Err(Error::file(
                    path,
                    format!("{name}: expected [1 to {WIDEST}, channels, 3, 3], found {other:?}"),
                )),
            }
        };
        let widths = [
            width("net_2.weight", "proj.conv1.weight")?,
            width("net_3.weight", "proj.conv2.weight")?,
        ];
        let vb = VarBuilder::zeros(dtype, device);
        let mut encoder = Self::new(&SamVisionConfig::default(), widths, kind, vb)?;
        nn::checkpoint::load(&mut encoder, path, &checkpoint::DEEPSEEK_OCR)?;
        Ok(encoder)
    }

    /// `[B, channels, S, S] -> [B, 1024, h / 4, h / 4]`, h the patches along a side, rounded up; S is any multiple of
    /// the patch size, 512, 640, 1024 and 1280 in DeepSeek-OCR.
    ///
    /// # Errors
    /// When `pixel_values` has no such shape, or an attention fails.
    pub fn forward(&self, pixel_values: &Tensor, mode: Mode) -> candle_core::Result<Tensor> {
        let projection = &self.sam.patch_embed.projection;
        let (channels, patch) = (projection.weight.dim(1)?, projection.stride);
        match *pixel_values.dims() {
            [b, c, h, w] if b > 0 && c == channels && h == w && h > 0 && h.is_multiple_of(patch) => {}
            ref other => bail!(
                "deepseek-ocr: pixel_values must have shape [B, {channels}, S, S] with S a multiple of {patch}, \
                 got {other:?}"
            ),
        }
        let pixel_values = pixel_values.to_dtype(projection.weight.dtype())?;
        let mut x = projection.forward(&pixel_values.permute((0, 2, 3, 1))?, mode)?;
        if let Some(pos_embed) = &self.sam.pos_embed {
            x = broadcast_add(&x, &resize_bicubic(pos_embed, x.dim(1)?)?)?;
        }
        let x = self.net_2.forward(&self.sam.encode(x, mode)?, mode)?;
        self.net_3.forward(&x, mode)?.permute((0, 3, 1, 2))
    }
}
