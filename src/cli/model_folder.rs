//! Models written as others read them: the folder of transformers' `save_pretrained`, the file of segment-anything.

use super::arguments::Storage;
use super::model::Source;
use crate::lora::{CONFIG_FILE, TENSORS_FILE};
use crate::sam::checkpoint::{self, Naming};
use crate::sam::{SamConfig, SamModel, SamProcessor};
use crate::{files, write_atomic, Error, Result};
use anyhow::bail;
use candle_core::DType;
use serde::Serialize;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Where results go
#[derive(clap::Args, Clone, Debug)]
pub struct Destination {
    /// Folder or file that gets the result
    #[arg(long, value_name = "PATH")]
    pub output: PathBuf,
    /// Replace what is there
    #[arg(long)]
    overwrite: bool,
}

impl Destination {
    /// Refuses a path where one of these results is already; an empty name is the path itself.
    ///
    /// # Errors
    /// - a result is there and `--overwrite` was not given.
    pub fn check(&self, names: &[&str]) -> anyhow::Result<()> {
        if let Some(path) = self.paths(names).find(|path| path.exists() && !self.overwrite) {
            bail!("{}: exists already; choose another --output or --overwrite", path.display())
        }
        Ok(())
    }

    /// Refuses results in the place of a file that they are made from, whatever `--overwrite` says.
    ///
    /// # Errors
    /// - a result would replace the model or the adapter.
    pub fn spare(&self, names: &[&str], source: &Source) -> anyhow::Result<()> {
        let inputs = [Some(&source.weights), source.adapter.as_ref()].into_iter().flatten();
        let inputs = inputs.flat_map(|input| {
            let inside = FILES.iter().chain(&[CONFIG_FILE, TENSORS_FILE]);
            inside.map(move |name| input.join(name)).chain([input.clone()])
        });
        let inputs: Vec<_> = inputs.filter_map(|path| path.canonicalize().ok()).collect();
        let is_input = |path: &PathBuf| path.canonicalize().is_ok_and(|p| inputs.contains(&p));
        if let Some(path) = self.paths(names).find(is_input) {
            bail!("{}: the result is made from it; choose another --output", path.display())
        }
        Ok(())
    }

    fn paths<'a>(&'a self, names: &'a [&str]) -> impl Iterator<Item = PathBuf> + 'a {
        names.iter().map(|name| match *name {
            "" => self.output.clone(),
            name => self.output.join(name),
        })
    }
}

/// Type of the numbers in a written file
#[derive(clap::Args, Clone, Copy, Debug)]
pub struct StorageArgument {
    /// Type of the written weights
    #[arg(long, value_enum, default_value_t = Storage::F32)]
    dtype: Storage,
}

impl StorageArgument {
    /// As candle has it.
    pub fn dtype(self) -> DType {
        self.dtype.into()
    }
}

/// Names of the written files, the weights first.
pub const FILES: [&str; 3] = ["model.safetensors", "config.json", "preprocessor_config.json"];

/// Writes the folder that transformers' `SamModel.from_pretrained` and `SamProcessor.from_pretrained` read.
///
/// # Errors
/// - a file or the folder cannot be written.
pub fn write(
    model: &SamModel,
    processor: &SamProcessor,
    folder: &Path,
    dtype: DType,
) -> Result<()> {
    let [weights, config_file, processor_file] = FILES.map(|name| folder.join(name));
    let mut config: SamConfig = model.config().clone();
    config.extra.shift_remove("torch_dtype");
    let name = match dtype {
        DType::BF16 => "bfloat16",
        DType::F16 => "float16",
        _ => "float32",
    };
    config.extra.insert("dtype".into(), json!(name));
    let config = config.to_json()?;
    files::create_dir(folder)?;
    checkpoint::save(model, weights, Naming::HuggingFace, Some(dtype))?;
    write_atomic(config_file, |file| file.write_all(config.as_bytes()))?;
    let mask_side = 4 * model.config().vision_config.grid_size();
    let text = serde_json::to_string_pretty(&ProcessorFile::new(processor, mask_side))
        .map_err(|e| Error::file(&processor_file, e.to_string()))?;
    write_atomic(&processor_file, |file| file.write_all(text.as_bytes()))
}

/// `preprocessor_config.json` of transformers' `SamImageProcessor`.
#[derive(Serialize)]
struct ProcessorFile {
    image_processor_type: &'static str,
    processor_class: &'static str,
    do_convert_rgb: bool,
    do_resize: bool,
    size: LongestEdge,
    mask_size: LongestEdge,
    resample: u32,
    do_rescale: bool,
    rescale_factor: f64,
    do_normalize: bool,
    image_mean: [f32; 3],
    image_std: [f32; 3],
    do_pad: bool,
    pad_size: Square,
    mask_pad_size: Square,
}

#[derive(Serialize)]
struct LongestEdge {
    longest_edge: usize,
}

#[derive(Serialize)]
struct Square {
    height: usize,
    width: usize,
}

impl ProcessorFile {
    fn new(processor: &SamProcessor, mask_side: usize) -> Self {
        let square = |side| Square { height: side, width: side };
        Self {
            image_processor_type: "SamImageProcessor",
            processor_class: "SamProcessor",
            do_convert_rgb: true,
            do_resize: true,
            size: LongestEdge { longest_edge: processor.longest_edge },
            mask_size: LongestEdge { longest_edge: mask_side },
            resample: 2,
            do_rescale: true,
            rescale_factor: processor.rescale_factor,
            do_normalize: true,
            image_mean: processor.image_mean,
            image_std: processor.image_std,
            do_pad: true,
            pad_size: square(processor.pad_size),
            mask_pad_size: square(mask_side),
        }
    }
}
