//! Segment Anything: image encoder, prompt encoder and mask decoder, trainable throughout.
//!
//! Structs are named, and their fields ordered and named, as in Hugging Face's `modeling_sam.py`, so that the tree
//! of a [`SamModel`] has exactly the tensor names of its checkpoints. Tokens and feature maps are channels last,
//! `[B, H, W, C]`, everywhere inside; only what Hugging Face shows its users as `[B, C, H, W]` is so here too.
//!
//! The attention of the image encoder is a trait, [`VisionAttention`]; `docs/hack-your-own.md` shows how to put
//! one's own into some or all layers.

mod attention;
pub mod checkpoint;
mod config;
mod deepseek;
mod encoder;
#[cfg(feature = "images")]
mod image_file;
mod mask_decoder;
mod model;
#[cfg(feature = "images")]
mod processor;
mod prompt_encoder;
mod transformer;
mod validate;
mod vision_model;

pub use attention::{
    in_windows, AttentionKind, LayerContext, RelPosCore, SamVisionAttention,
    SamVisionAttentionSplit, VisionAttention,
};
pub use config::{
    model_type, HiddenAct, SamConfig, SamMaskDecoderConfig, SamPromptEncoderConfig, SamVisionConfig,
};
pub use deepseek::DeepSeekOcrEncoder;
pub use encoder::{
    SamPatchEmbeddings, SamVisionEncoder, SamVisionEncoderOutput, SamVisionLayer, SamVisionNeck,
};
#[cfg(feature = "images")]
pub use image_file::{
    convert_to_rgb, is_transparent, read_image, Picture, Raster, RasterKind, ReadOptions,
    SampleType, Samples, ValueRange,
};
pub use mask_decoder::{SamFeedForward, SamMaskDecoder};
pub use model::{SamInput, SamModel, SamOutput};
#[cfg(feature = "images")]
pub(crate) use processor::MaskResizer;
#[cfg(feature = "images")]
pub use processor::{Frame, SamProcessor};
pub use prompt_encoder::{SamMaskEmbedding, SamPositionalEmbedding, SamPromptEncoder, SamPrompts};
pub use transformer::{SamAttention, SamTwoWayAttentionBlock, SamTwoWayTransformer};
pub use vision_model::SamVisionModel;

/// The code of the document, compiled and run.
#[cfg(doctest)]
#[doc = include_str!("../../docs/hack-your-own.md")]
struct HackYourOwn;
