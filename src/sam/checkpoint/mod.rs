//! Checkpoints of SAM, safetensors and files of `torch.save`. They are read in Hugging Face's or the original naming,
//! whole or sharded, with q, k and v fused or split. They are written in either naming with q, k and v fused, as other
//! tools expect them.
//!
//! [`nn::checkpoint`] does the work; the tables [`SAM`], [`CELLPOSE_SAM`] and so on hold the names.
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_sam_lora::sam::{checkpoint, checkpoint::Naming, AttentionKind, SamModel};
//!
//! # fn main() -> candle_sam_lora::Result<()> {
//! let mut sam = SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Split, DType::F32, &Device::Cpu)?;
//! // For the original segment-anything: q, k and v fused, in f16.
//! let path = std::env::temp_dir().join("candle-sam-lora-original.safetensors");
//! checkpoint::save(&sam, &path, Naming::Original, Some(DType::F16))?;
//! checkpoint::load(&mut sam, &path)?;
//! let names = checkpoint::to_original(&["vision_encoder.layers.0.attn.qkv.weight"]);
//! assert_eq!(names, ["image_encoder.blocks.0.attn.qkv.weight"]);
//! # Ok(())
//! # }
//! ```

mod names;
mod sizes;

pub use crate::nn::checkpoint::split_prefix;
pub use names::{CELLPOSE_SAM, DEEPSEEK_OCR, DEEPSEEK_VL, GOT_OCR2, SAM, VITDET};
pub use sizes::{is_sam_hq, sizes, vision_sizes, Sizes};

use super::SamConfig;
use crate::nn::checkpoint::{Loaded, Names};
use crate::nn::{self, ModuleTree};
use crate::{files, Result};
use candle_core::DType;
use std::path::Path;

/// The naming of tensors in a file.
///
/// [Example](crate::sam::checkpoint)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// `vision_encoder.layers.0.attn.qkv.weight`, as Hugging Face's `SamModel`.
    HuggingFace,
    /// `image_encoder.blocks.0.attn.qkv.weight`, as the original segment-anything.
    Original,
}

/// Fills a SAM, or a part of one, from a checkpoint; see [`nn::checkpoint::load`].
///
/// Reads Hugging Face's and the original naming, also below a prefix such as `model.`, and `qkv` fused or split. An
/// image encoder, prompt encoder or mask decoder alone, bare or in a [`SamVisionModel`](crate::sam::SamVisionModel),
/// takes its part of a whole SAM. From SAMed's and micro-sam's files it takes all but the adapters.
///
/// [Example](crate::sam::checkpoint)
///
/// # Errors
/// As [`nn::checkpoint::load`].
pub fn load(model: &mut dyn ModuleTree, path: impl AsRef<Path>) -> Result<Loaded> {
    nn::checkpoint::load(model, path, &SAM)
}

/// Writes a SAM, or a part of one, to one safetensors file, q, k and v fused into `qkv`; see [`nn::checkpoint::save`].
///
/// [Example](crate::sam::checkpoint)
///
/// # Errors
/// - the file cannot be written;
/// - the prompts have position features of their own, and the original naming has one name for theirs and the image's.
pub fn save(
    model: &dyn ModuleTree,
    path: impl AsRef<Path>,
    naming: Naming,
    dtype: Option<DType>,
) -> Result<()> {
    let names = Names { save_renamed: naming == Naming::Original, ..SAM };
    nn::checkpoint::save(model, path, &names, dtype)
}

/// Writes `model.safetensors` and `config.json` into a folder, as Hugging Face's `save_pretrained` does; the folder
/// is made where there is none.
///
/// [Example](crate::sam::checkpoint)
///
/// # Errors
/// - a file or the folder cannot be written.
pub fn save_pretrained(
    model: &dyn ModuleTree,
    config: &SamConfig,
    folder: impl AsRef<Path>,
) -> Result<()> {
    let folder = folder.as_ref();
    let json = config.to_json()?;
    files::create_dir(folder)?;
    save(model, folder.join("model.safetensors"), Naming::HuggingFace, None)?;
    files::write_atomic(folder.join("config.json"), |file| file.write_all(json.as_bytes()))
}

/// Original names as Hugging Face names, in the same order; see [`Names::to_tree`].
///
/// [Example](crate::sam::checkpoint)
pub fn to_hugging_face(names: &[&str]) -> Vec<String> {
    SAM.to_tree(names)
}

/// Hugging Face names as original names, in the same order; see [`Names::to_file`].
///
/// [Example](crate::sam::checkpoint)
pub fn to_original(names: &[&str]) -> Vec<String> {
    SAM.to_file(names)
}
