//! An image embedded once and prompted often.
//!
//! Source: `SamPredictor` of segment-anything.

use super::identity::{self, Identity};
use super::prompt_encoder::is_near;
use super::{
    Frame, PreparedImages, Rle, SamHqImages, SamHqModel, SamInput, SamModel, SamProcessor,
};
use crate::nn::{without_gradients, Mode, ModuleTree, Node};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor, TensorId};
use image::DynamicImage;
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

/// A model and its processor. The encoder runs once an image, the decoder once a call.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_sam_lora::sam::{AttentionKind, Prompt, SamModel, SamPredictor};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let model = SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Fused, DType::F32, &Device::Cpu)?;
/// let predictor = SamPredictor::new(&model);
/// let embedding = predictor.embed(&image::DynamicImage::new_rgb8(320, 240))?;
/// let prompts = [Prompt::at(100.0, 80.0), Prompt::within([20.0, 20.0, 200.0, 120.0])];
/// for prediction in predictor.predict(&embedding, &prompts, true)? {
///     let best = prediction.best();
///     let mask = predictor.mask(&embedding, &prediction, best)?;
///     assert_eq!(mask.size(), (240, 320));
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct SamPredictor<'a> {
    model: &'a SamModel,
    /// The SAM-HQ that `model` is in.
    hq: Option<&'a SamHqModel>,
    processor: SamProcessor,
    identity: OnceLock<Identity>,
    last: Arc<Mutex<Option<LastImage>>>,
}

/// The image that was prompted last, ready for its next prompts.
#[derive(Clone, Debug)]
struct LastImage {
    embedding: TensorId,
    prepared: PreparedImages,
}

/// An image as the prompts see it.
///
/// [Example](crate::sam::SamPredictor)
#[derive(Clone, Debug)]
pub struct ImageEmbedding {
    /// `[1, C, h, w]`, as [`SamVisionEncoder::forward`](super::SamVisionEncoder::forward) gives it.
    pub tensor: Tensor,
    /// `[1, 4h, 4w, C/8]` of a SAM-HQ, as [`SamHqModel::encode`] gives them.
    pub hq_features: Option<Tensor>,
    /// Where the image lies in the model's input.
    pub frame: Frame,
}

/// A point of a prompt, in pixels of the image.
///
/// [Example](crate::sam::SamPredictor)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct PromptPoint {
    /// From the left.
    pub x: f32,
    /// From above.
    pub y: f32,
    /// Whether the point lies on the object, or off it.
    pub on_object: bool,
}

/// Any prompts that mean one object.
///
/// [Example](crate::sam::SamPredictor)
#[derive(Clone, Debug, Default)]
pub struct Prompt {
    /// Points on the object and off it.
    pub points: Vec<PromptPoint>,
    /// `[x0, y0, x1, y1]` in pixels of the image.
    pub bounds: Option<[f32; 4]>,
    /// Logits `[4h, 4w]`, such as one of [`Prediction::logits`].
    pub logits: Option<Tensor>,
}

impl Prompt {
    /// A point on the object.
    pub fn at(x: f32, y: f32) -> Self {
        Self::default().and_at(x, y, true)
    }

    /// A box around the object, `[x0, y0, x1, y1]`.
    pub fn within(bounds: [f32; 4]) -> Self {
        Self { bounds: Some(bounds), ..Self::default() }
    }

    /// One more point, on the object or off it.
    pub fn and_at(mut self, x: f32, y: f32, on_object: bool) -> Self {
        self.points.push(PromptPoint { x, y, on_object });
        self
    }

    /// The logits of an earlier prediction, to be refined.
    pub fn and_logits(mut self, logits: Tensor) -> Self {
        self.logits = Some(logits);
        self
    }
}

/// The M masks that the model takes for the object of one prompt.
///
/// [Example](crate::sam::SamPredictor)
#[derive(Clone, Debug)]
pub struct Prediction {
    /// `[M, 4h, 4w]`, of the model's whole input; [`SamPredictor::mask`] brings them to the image's size.
    pub logits: Tensor,
    /// The IoU that the model expects of each mask.
    pub iou_scores: Vec<f32>,
}

impl Prediction {
    /// The mask with the highest score.
    pub fn best(&self) -> usize {
        let scores = &self.iou_scores;
        (0..scores.len()).max_by(|a, b| scores[*a].total_cmp(&scores[*b])).unwrap_or(0)
    }
}

impl<'a> SamPredictor<'a> {
    /// With SAM's own processor for the model's input size.
    pub fn new(model: &'a SamModel) -> Self {
        let image_size = model.config().vision_config.image_size;
        Self::with_processor(model, SamProcessor::new(image_size))
    }

    /// With the processor that a folder describes, see [`SamProcessor::load`].
    pub fn with_processor(model: &'a SamModel, processor: SamProcessor) -> Self {
        Self { model, hq: None, processor, identity: OnceLock::new(), last: Arc::default() }
    }

    /// With a SAM-HQ. Its masks are SAM's and the HQ mask together.
    pub fn of_hq(model: &'a SamHqModel, processor: SamProcessor) -> Self {
        Self { hq: Some(model), ..Self::with_processor(&model.sam, processor) }
    }

    /// The processor.
    pub fn processor(&self) -> &SamProcessor {
        &self.processor
    }

    /// Checksums of the image encoder and its adapters, computed once unless the encoder is trainable.
    ///
    /// # Errors
    /// - the model is a SAM-HQ, whose features an embedding's file has not.
    pub(super) fn identity(&self) -> Result<Identity> {
        if self.hq.is_some() {
            return Err(Error::config("sam-hq: its image embeddings cannot be kept in files"));
        }
        if let Some(identity) = self.identity.get() {
            return Ok(identity.clone());
        }
        let found = identity::identity(self.model)?;
        match found.is_trainable {
            true => Ok(found),
            false => Ok(self.identity.get_or_init(|| found).clone()),
        }
    }

    /// Dtype and device of the model.
    pub(super) fn place(&self) -> (DType, &Device) {
        let weight = &self.model.mask_decoder.mask_tokens.weight;
        (weight.dtype(), weight.device())
    }

    /// The shape of an embedding, `[1, C, h, w]`.
    pub(super) fn embedding_shape(&self) -> Result<[usize; 4]> {
        let side = self.model.config().vision_config.grid_size();
        Ok([1, self.model.mask_decoder.mask_tokens.weight.dim(1)?, side, side])
    }

    /// Bytes of an embedding in memory.
    ///
    /// # Errors
    /// - the model's configuration has no embedding.
    pub(crate) fn embedding_bytes(&self) -> Result<u64> {
        let elements: usize = self.embedding_shape()?.iter().product();
        Ok((elements * self.place().0.size_in_bytes()) as u64)
    }

    /// Runs the image encoder.
    ///
    /// # Errors
    /// - as [`SamProcessor::preprocess`];
    /// - the processor's size is not the model's.
    pub fn embed(&self, image: &DynamicImage) -> Result<ImageEmbedding> {
        let (dtype, device) = self.place();
        let (pixel_values, frame) = self.processor.preprocess(image, device)?;
        let pixel_values = pixel_values.to_dtype(dtype)?;
        if let Some(hq) = self.hq {
            let images = without_gradients(hq)?.encode(&pixel_values, Mode::Eval)?;
            let hq_features = Some(images.hq_features);
            return Ok(ImageEmbedding { tensor: images.image_embeddings, hq_features, frame });
        }
        let encoder = without_gradients(&self.model.vision_encoder)?;
        let tensor = encoder.forward(&pixel_values, Mode::Eval)?;
        Ok(ImageEmbedding { tensor, hq_features: None, frame })
    }

    /// The masks of each prompt, in the prompts' order: the three alternatives of an ambiguous prompt, or one.
    ///
    /// Prompts with equally many points run together; those with logits run alone.
    ///
    /// # Errors
    /// - a prompt is empty, or a coordinate is not finite or beyond 2^24 pixels;
    /// - logits or the embedding do not have the model's shape.
    pub fn predict(
        &self,
        image: &ImageEmbedding,
        prompts: &[Prompt],
        multimask_output: bool,
    ) -> Result<Vec<Prediction>> {
        let mut alike: BTreeMap<(usize, bool, usize), Vec<usize>> = BTreeMap::new();
        for (index, prompt) in prompts.iter().enumerate() {
            check(index, prompt)?;
            // Every prompt with logits is a group of its own: the model takes one mask an image.
            let alone = if prompt.logits.is_some() { 1 + index } else { 0 };
            let kind = (prompt.points.len(), prompt.bounds.is_some(), alone);
            alike.entry(kind).or_default().push(index);
        }
        let mut predictions: Vec<Option<Prediction>> = vec![None; prompts.len()];
        for members in alike.values() {
            let group: Vec<&Prompt> = members.iter().map(|index| &prompts[*index]).collect();
            let output = self.run(image, &group, multimask_output)?;
            for (index, prediction) in members.iter().zip(output) {
                predictions[*index] = Some(prediction);
            }
        }
        Ok(predictions.into_iter().flatten().collect())
    }

    /// A mask of a prediction at the size of the image: where the logit is above 0.
    ///
    /// # Errors
    /// - there is no such mask, or the image has more than 2^32 pixels.
    pub fn mask(
        &self,
        image: &ImageEmbedding,
        prediction: &Prediction,
        index: usize,
    ) -> Result<Rle> {
        let count = prediction.logits.dims().first().copied().unwrap_or(0);
        if index >= count {
            return Err(Error::config(format!("mask {index} of a prediction of {count} masks")));
        }
        let logits = prediction.logits.get(index)?;
        let logits = self.processor.resize_masks(&logits, &image.frame)?;
        let inside: Vec<bool> =
            logits.flatten_all()?.to_vec1::<f32>()?.into_iter().map(|logit| logit > 0.0).collect();
        let (height, width) = image.frame.original;
        Rle::from_mask(&inside, (height as u32, width as u32))
    }

    /// The embedding, ready for prompts. That of the last call serves again for the same embedding, if nothing is
    /// trained. Another model may own the same memory, so parameters are compared.
    fn prepared(&self, embedding: &Tensor) -> candle_core::Result<PreparedImages> {
        let mut trained = embedding.track_op();
        self.model.visit("", &mut |_, node| {
            if let Node::Parameter(tensor) = node {
                trained |= tensor.track_op();
            }
        });
        if trained {
            return self.model.prepare(embedding);
        }
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.as_ref().filter(|last| last.embedding == embedding.id()) {
            if self.model.is_current(&last.prepared)? {
                return Ok(last.prepared.clone());
            }
        }
        let prepared = self.model.prepare(embedding)?;
        *last = Some(LastImage { embedding: embedding.id(), prepared: prepared.clone() });
        Ok(prepared)
    }

    /// One call of the decoder, for prompts of the same kind.
    fn run(
        &self,
        image: &ImageEmbedding,
        prompts: &[&Prompt],
        multimask_output: bool,
    ) -> Result<Vec<Prediction>> {
        let mut input = tensors(prompts, &image.frame, image.tensor.device())?;
        input.multimask_output = multimask_output;
        let output = if let Some(hq) = self.hq {
            let Some(hq_features) = image.hq_features.clone() else {
                return Err(Error::config("sam-hq: the embedding is of another model"));
            };
            let images = SamHqImages { image_embeddings: image.tensor.clone(), hq_features };
            hq.prompt(&images, &input, false, Mode::Eval)?
        } else if input.input_masks.is_none() {
            self.model.prompt(&self.prepared(&image.tensor)?, &input)?
        } else {
            input.image_embeddings = Some(image.tensor.clone());
            self.model.forward(&input, Mode::Eval)?
        };
        let scores = output.iou_scores.squeeze(0)?.to_dtype(DType::F32)?.to_vec2::<f32>()?;
        let masks = output.pred_masks.squeeze(0)?;
        let prediction =
            |(index, iou_scores)| Ok(Prediction { logits: masks.get(index)?, iou_scores });
        scores.into_iter().enumerate().map(prediction).collect()
    }
}

/// Prompts of the same kind as the model's input.
fn tensors(prompts: &[&Prompt], frame: &Frame, device: &Device) -> Result<SamInput> {
    let mut input = SamInput::default();
    let (count, points) = (prompts.len(), prompts.first().map_or(0, |prompt| prompt.points.len()));
    if points > 0 {
        let all = || prompts.iter().flat_map(|prompt| &prompt.points);
        let places: Vec<f32> = all().flat_map(|point| [point.x, point.y]).collect();
        let labels: Vec<f32> = all().map(|point| f32::from(u8::from(point.on_object))).collect();
        let places = Tensor::from_vec(places, (1, count, points, 2), device)?;
        input.input_points = Some(frame.scale_points(&places)?);
        input.input_labels = Some(Tensor::from_vec(labels, (1, count, points), device)?);
    }
    let bounds: Vec<f32> = prompts.iter().filter_map(|prompt| prompt.bounds).flatten().collect();
    if !bounds.is_empty() {
        let bounds = Tensor::from_vec(bounds, (1, count, 4), device)?;
        input.input_boxes = Some(frame.scale_boxes(&bounds)?);
    }
    if let Some(logits) = prompts.iter().find_map(|prompt| prompt.logits.as_ref()) {
        input.input_masks = Some(logits.unsqueeze(0)?.unsqueeze(0)?);
    }
    Ok(input)
}

fn check(index: usize, prompt: &Prompt) -> Result<()> {
    let places = prompt.points.iter().flat_map(|point| [point.x, point.y]);
    let far = places.chain(prompt.bounds.into_iter().flatten()).find(|value| !is_near(*value));
    if let Some(value) = far {
        let message = format!("prompt {index}: the coordinate {value:e} is no pixel near an image");
        return Err(Error::Config(message));
    }
    if prompt.points.is_empty() && prompt.bounds.is_none() && prompt.logits.is_none() {
        return Err(Error::Config(format!("prompt {index}: no point, no box and no logits")));
    }
    Ok(())
}
