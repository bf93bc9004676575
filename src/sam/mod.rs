//! Segment Anything: image encoder, prompt encoder and mask decoder, trainable throughout.
//!
//! Structs and their fields are named and ordered as in Hugging Face's `modeling_sam.py`. So the tree of a [`SamModel`]
//! has exactly the tensor names of its checkpoints. Tokens and feature maps are channels last, `[B, H, W, C]`,
//! everywhere inside; only what Hugging Face shows its users as `[B, C, H, W]` is so here too.
//!
//! The attention of the image encoder is a trait, [`VisionAttention`];
//! [`guide::hack_your_own`](crate::guide::hack_your_own) shows how to put one's own into some or all layers.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use candle_sam_lora::nn::Mode;
//! use candle_sam_lora::sam::{AttentionKind, SamInput, SamModel};
//!
//! # fn main() -> candle_sam_lora::Result<()> {
//! let sam = SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Fused, DType::F32, &Device::Cpu)?;
//! let side = sam.config().vision_config.image_size;
//! let input = SamInput {
//!     pixel_values: Some(Tensor::zeros((1, 3, side, side), DType::F32, &Device::Cpu)?),
//!     input_points: Some(Tensor::new(&[[[[30f32, 30.0]]]], &Device::Cpu)?), // image, object, point, (x, y)
//!     ..Default::default()
//! };
//! let output = sam.forward(&input, Mode::Eval)?;
//! assert_eq!(output.pred_masks.dims()[..2], [1, 1]); // image, object, mask, row, column
//! # Ok(())
//! # }
//! ```

mod attention;
pub mod candle_transformers;
mod cellpose;
pub mod checkpoint;
mod config;
mod deepseek;
mod deepseek_vl;
#[cfg(feature = "images")]
mod embedding;
#[cfg(feature = "images")]
mod embedding_store;
mod encoder;
#[cfg(feature = "images")]
mod generate;
mod got_ocr2;
mod hq;
#[cfg(feature = "images")]
mod identity;
#[cfg(feature = "images")]
mod image_file;
mod mask_decoder;
mod model;
#[cfg(feature = "images")]
mod predictor;
#[cfg(feature = "images")]
mod processor;
mod prompt_encoder;
#[cfg(feature = "images")]
pub(crate) mod rle;
mod transformer;
mod validate;
mod vision_model;
mod vitdet;

pub use attention::{
    in_windows, AttentionKind, LayerContext, RelPosCore, SamVisionAttention,
    SamVisionAttentionSplit, VisionAttention,
};
#[cfg(feature = "images")]
pub use cellpose::normalized_image;
pub use cellpose::{CellDynamics, CellFlows, CellposeSam};
pub use config::{
    model_type, HiddenAct, SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig,
};
pub use deepseek::DeepSeekOcrEncoder;
pub use deepseek_vl::{DeepseekVlHighRes, DeepseekVlProjection};
#[cfg(feature = "images")]
pub use embedding::{EmbeddingOrigin, EmbeddingPrecision};
#[cfg(feature = "images")]
pub use embedding_store::{Embedded, EmbeddingStore};
pub use encoder::{
    SamPatchEmbeddings, SamVisionEncoder, SamVisionEncoderOutput, SamVisionLayer, SamVisionNeck,
};
#[cfg(feature = "images")]
pub use generate::{
    geojson_feature, label_image, save_geojson, save_label_strips, save_labels, Calibration,
    Calibrator, CocoAnnotations, Crop, Generated, GeneratedMask, GenerationStatistics,
    MaskGenerator, Ranking, ScoredCandidate, Tile, Tiling,
};
pub use got_ocr2::{GotOcr2Encoder, GotOcr2Projector};
pub use hq::{SamHqImages, SamHqModel, SamHqParts};
#[cfg(feature = "images")]
pub use image_file::{
    convert_to_rgb, is_transparent, read_image, Channels, LargeImage, Picture, Raster, RasterKind,
    ReadOptions, SampleType, Samples, ValueRange,
};
#[cfg(feature = "images")]
pub(crate) use image_file::{has_image_ending, is_image, read_file, ImageFolder};
pub use mask_decoder::{PreparedImages, SamFeedForward, SamMaskDecoder, SamMaskDecoderInput};
pub use model::{SamInput, SamModel, SamOutput};
#[cfg(feature = "images")]
pub use predictor::{ImageEmbedding, Prediction, Prompt, PromptPoint, SamPredictor};
#[cfg(feature = "images")]
pub(crate) use processor::MaskResizer;
#[cfg(feature = "images")]
pub use processor::{Frame, SamProcessor};
pub use prompt_encoder::{SamMaskEmbedding, SamPositionalEmbedding, SamPromptEncoder, SamPrompts};
#[cfg(feature = "images")]
pub use rle::{Polygon, Ring, Rle};
pub use transformer::{SamAttention, SamTwoWayAttentionBlock, SamTwoWayTransformer, SharedImage};
pub use vision_model::SamVisionModel;
pub use vitdet::{VitDetBackbone, VitDetConfig, VitDetLayer, VitDetResBottleneckBlock};
