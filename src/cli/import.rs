//! `import`: files of SAMed and micro-sam as a PEFT adapter and a model folder.
//!
//! ```text
//! SAMed's LoRA file      w_a_000 .., prompt encoder, mask decoder     adapter, and the base with these parts
//! micro-sam              the whole model, perhaps with LoRA           model, and the adapter if there is one
//! ```

use super::console::Console;
use super::model::{self, Placement};
use super::model_folder::{self, Destination};
use crate::lora::{read_samed_adapter, write_adapter};
use crate::nn::checkpoint::TensorReader;
use crate::nn::ModuleTree;
use crate::sam::{checkpoint, AttentionKind, SamModel};
use crate::Error;
use anyhow::Context;
use candle_core::DType;
use candle_nn::VarBuilder;
use serde_json::json;
use std::path::{Path, PathBuf};

/// Turns a file of SAMed or micro-sam into a PEFT adapter and a model folder
///
/// Writes OUTPUT/adapter if the file holds LoRA, and OUTPUT/model if it holds parts of SAM. The other commands read
/// them by --adapter and --model; PEFT and transformers read them too.
#[derive(clap::Args)]
pub struct Options {
    /// The file, of torch.save or safetensors
    file: PathBuf,
    /// The model that the file was trained on; a file with a whole model needs none
    #[arg(long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    /// Blocks that SAMed's adapters belong to, from 0, in their order [default: all]
    #[arg(long, value_name = "BLOCK,..", value_delimiter = ',')]
    blocks: Option<Vec<usize>>,
    #[command(flatten)]
    destination: Destination,
    #[command(flatten)]
    console: Console,
}

/// The end of the name of the tensor that has a row for each mask of the decoder.
const MASK_TOKENS: &str = "mask_decoder.mask_tokens.weight";

/// The kind of a file.
struct Contents {
    encoder: bool,
    prompts: bool,
    decoder: bool,
    /// Masks of the decoder, where it is there: SAMed has one for each class beside the single one.
    masks: Option<usize>,
    lora: bool,
}

impl Contents {
    fn of(path: &Path) -> crate::Result<Self> {
        let reader = TensorReader::open(path)?;
        let has = |words: &[&str]| {
            reader.tensors().keys().any(|name| words.iter().any(|word| name.contains(word)))
        };
        let masks = reader.tensors().iter().find(|(name, _)| name.ends_with(MASK_TOKENS));
        Ok(Self {
            encoder: has(&["patch_embed"]),
            prompts: has(&["prompt_encoder."]),
            decoder: has(&["mask_decoder."]),
            masks: masks.and_then(|(_, tokens)| tokens.shape.first().copied()),
            lora: has(&["w_a_", "linear_a_"]),
        })
    }

    fn is_whole_model(&self) -> bool {
        self.encoder && self.prompts && self.decoder
    }

    fn has_parts(&self) -> bool {
        self.encoder || self.prompts || self.decoder
    }
}

pub fn run(options: &Options) -> anyhow::Result<()> {
    let Options { file, destination, console, .. } = options;
    let folders = ["model", "adapter"].map(|name| destination.output.join(name));
    let [model_folder, adapter_folder] = &folders;
    destination.check(&["model", "adapter"])?;
    let contents = Contents::of(file)?;
    if !contents.lora && !contents.has_parts() {
        let message = "holds neither parts of a SAM nor LoRA as SAMed or micro-sam write it";
        return Err(Error::file(file, message).into());
    }
    let (model, base) = load(options, &contents)?;
    let (mut lines, mut object) = (vec![], json!({ "file": file, "model": null, "adapter": null }));
    if contents.has_parts() {
        let processor = model::processor(&base, model.config(), *console)?;
        model_folder::write(&model, &processor, model_folder, DType::F32)?;
        lines.push(format!("{}: the model", model_folder.display()));
        object["model"] = json!(model_folder);
    }
    if contents.lora {
        let (mut config, tensors) = read_samed_adapter(&model, file, options.blocks.as_deref())?;
        let base = match contents.has_parts() {
            true => std::path::absolute(model_folder).map_err(|e| Error::io(model_folder, e))?,
            false => options.model.clone().unwrap_or(base),
        };
        config.base_model_name_or_path = base.to_str().map(str::to_string);
        write_adapter(&config, &tensors, adapter_folder)?;
        lines.push(format!("{}: LoRA of rank {}", adapter_folder.display(), config.rank));
        object["adapter"] = json!(adapter_folder);
    }
    console.result(lines.join("\n"), object);
    Ok(())
}

/// The model that the file means, q, k and v apart, and the path of the files it starts from.
fn load(options: &Options, contents: &Contents) -> anyhow::Result<(SamModel, PathBuf)> {
    let (file, console) = (&options.file, options.console);
    let place = Placement::exact();
    if options.model.is_none() && contents.is_whole_model() {
        return Ok((model::load(file, AttentionKind::Split, &place, console)?, file.clone()));
    }
    let name = options.model.as_deref().with_context(|| {
        format!(
            "{}: is no whole model; name the one it was trained on with --model",
            file.display()
        )
    })?;
    let base = model::folder(Some(name))?;
    let mut model = model::load(&base, AttentionKind::Split, &place, console)?;
    if let Some(masks) = contents.masks {
        model = with_masks(model, masks, &place)?;
    }
    let parts: [(bool, &mut dyn ModuleTree); 3] = [
        (contents.encoder, &mut model.vision_encoder),
        (contents.prompts, &mut model.prompt_encoder),
        (contents.decoder, &mut model.mask_decoder),
    ];
    for (_, part) in parts.into_iter().filter(|(is_there, _)| *is_there) {
        console.note(checkpoint::load(part, file)?);
    }
    Ok((model, base))
}

/// The model with a decoder of so many masks; a new decoder holds zeros, to be filled.
fn with_masks(model: SamModel, masks: usize, place: &Placement) -> crate::Result<SamModel> {
    let mut config = model.config().clone();
    config.mask_decoder_config.num_multimask_outputs = masks.saturating_sub(1);
    if config == *model.config() {
        return Ok(model);
    }
    let vb = VarBuilder::zeros(place.dtype, &place.device);
    let mut with_masks = SamModel::new(&config, AttentionKind::Split, vb)?;
    with_masks.shared_image_embedding = model.shared_image_embedding;
    with_masks.vision_encoder = model.vision_encoder;
    with_masks.prompt_encoder = model.prompt_encoder;
    Ok(with_masks)
}
