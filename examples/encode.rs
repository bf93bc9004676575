//! Runs SAM on tensors from a safetensors file, for comparison with other implementations:
//!
//! ```text
//! cargo run --release --example encode -- --model DIR --adapter DIR --input in.safetensors --output out.safetensors
//! ```

#[path = "shared/adapted.rs"]
mod adapted;
#[path = "shared/console.rs"]
mod console;
#[path = "shared/model.rs"]
mod model;

use anyhow::bail;
use candle_core::{DType, Tensor};
use candle_sam_lora::nn::Mode;
use candle_sam_lora::sam::{
    model_type, AttentionKind, DeepSeekOcrEncoder, SamInput, SamVisionConfig,
    SamVisionEncoderOutput, SamVisionModel,
};
use candle_sam_lora::{hub, read_tensors, write_tensors};
use clap::Parser;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

/// Runs a SAM on tensors from a safetensors file
///
/// Tensors read: pixel_values [B,3,S,S], and if wanted input_points [B,P,N,2], input_labels [B,P,N],
/// input_boxes [B,P,4], input_masks [B,1,4h,4w], as Hugging Face's SamModel takes them. Tensors written:
/// image_embeddings, hidden_states.0 .. hidden_states.N, and with prompts pred_masks and iou_scores. All in f32.
///
/// The model may be an image encoder alone (SamVisionModel); it takes no prompts.
///
/// With --deepseek-ocr the model is a checkpoint of DeepSeek-OCR, of which the SAM encoder runs: pixel_values
/// [B,3,S,S] of any S that is a multiple of 16 become image_embeddings [B,1024,S/64,S/64].
#[derive(Parser)]
struct Options {
    /// File of weights or folder with them, or, with the feature `hub`, OWNER/NAME[@REVISION] on the Hugging Face hub
    /// [default: the adapter's base model; without an adapter, the small SAM of this project]
    #[arg(long, value_name = "PATH|NAME")]
    model: Option<PathBuf>,
    /// Folder, file or name of a PEFT adapter, or a LoRA file of SAMed or micro-sam
    #[arg(long, value_name = "PATH|NAME")]
    adapter: Option<PathBuf>,
    /// Safetensors file to read
    #[arg(long, value_name = "FILE")]
    input: PathBuf,
    /// Safetensors file to write
    #[arg(long, value_name = "FILE")]
    output: PathBuf,
    /// Run the SAM encoder of DeepSeek-OCR
    #[arg(long, requires = "model")]
    deepseek_ocr: bool,
    /// One mask for each prompt instead of several (multimask_output=False)
    #[arg(long)]
    single_mask: bool,
    /// cpu or cuda
    #[arg(long, default_value = "cpu")]
    device: String,
}

const PROMPTS: [&str; 4] = ["input_points", "input_labels", "input_boxes", "input_masks"];

fn run(options: &Options) -> anyhow::Result<()> {
    let device = model::device(&options.device)?;
    let mut tensors = read_tensors(&options.input, &device)?;
    let mut take =
        |name: &str| tensors.remove(name).map(|tensor| tensor.to_dtype(DType::F32)).transpose();
    let Some(pixel_values) = take("pixel_values")? else {
        bail!("{}: has no tensor pixel_values", options.input.display())
    };
    let prompts = PROMPTS.map(&mut take);
    let prompted = prompts.iter().any(|prompt| !matches!(prompt, Ok(None)));
    let [input_points, input_labels, input_boxes, input_masks] = prompts;
    let mut input = SamInput {
        input_points: input_points?,
        input_labels: input_labels?,
        input_boxes: input_boxes?,
        input_masks: input_masks?,
        multimask_output: !options.single_mask,
        ..Default::default()
    };
    if let Some(name) = tensors.keys().next() {
        let known = PROMPTS.join(", ");
        bail!("{}: unknown tensor {name}; known: pixel_values, {known}", options.input.display())
    }
    let adapter = options.adapter.as_ref().map(hub::folder).transpose()?;
    let adapter = adapter.as_deref();
    let folder = adapted::base(options.model.as_deref(), adapter)?;
    if options.deepseek_ocr {
        if prompted {
            bail!("{}: DeepSeek-OCR's encoder takes no prompts", options.input.display())
        }
        let kind = adapter.map_or(Ok(AttentionKind::Fused), adapted::kind_of)?;
        let mut encoder = DeepSeekOcrEncoder::from_pretrained(&folder, kind, DType::F32, &device)?;
        adapter.map_or(Ok(()), |adapter| adapted::adapt(&mut encoder, adapter))?;
        let embeddings = encoder.forward(&pixel_values, Mode::Eval)?;
        return write(options, &BTreeMap::from([("image_embeddings".into(), embeddings)]));
    }
    let config = folder.join("config.json");
    if config.exists() && model_type(&config)? == SamVisionConfig::MODEL_TYPE {
        if prompted {
            bail!(
                "{}: has prompts, but the model in {} is an image encoder alone: it has no prompt encoder and no \
                 mask decoder",
                options.input.display(),
                folder.display()
            )
        }
        let kind = adapter.map_or(Ok(AttentionKind::Fused), adapted::kind_of)?;
        let mut model = SamVisionModel::from_pretrained(&folder, kind, DType::F32, &device)?;
        adapter.map_or(Ok(()), |adapter| adapted::adapt(&mut model, adapter))?;
        let encoder = &model.vision_encoder;
        let encoded = encoder.forward_with_states(&pixel_values, false, Mode::Eval)?;
        return write(options, &tensors_of(encoded));
    }
    let (_, sam) = adapted::load_adapted(&folder, adapter, &device)?;
    let encoded = sam.vision_encoder.forward_with_states(&pixel_values, false, Mode::Eval)?;
    let embeddings = encoded.image_embeddings.clone();
    let mut output = tensors_of(encoded);
    let prompts = [&input.input_points, &input.input_boxes, &input.input_masks];
    if prompts.iter().any(|prompt| prompt.is_some()) {
        input.image_embeddings = Some(embeddings);
        let masks = sam.forward(&input, Mode::Eval)?;
        output.insert("pred_masks".into(), masks.pred_masks);
        output.insert("iou_scores".into(), masks.iou_scores);
    } else if input.input_labels.is_some() {
        bail!("{}: input_labels without input_points", options.input.display())
    }
    write(options, &output)
}

fn tensors_of(encoded: SamVisionEncoderOutput) -> BTreeMap<String, Tensor> {
    let states = encoded.hidden_states.into_iter().enumerate();
    let states = states.map(|(index, state)| (format!("hidden_states.{index}"), state));
    states.chain([("image_embeddings".into(), encoded.image_embeddings)]).collect()
}

fn write(options: &Options, output: &BTreeMap<String, Tensor>) -> anyhow::Result<()> {
    write_tensors(&options.output, output)?;
    console::say(format!("{}: {} tensors", options.output.display(), output.len()));
    Ok(())
}

pub fn main() -> ExitCode {
    console::exit_code(run(&Options::parse()))
}
