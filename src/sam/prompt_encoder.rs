//! The prompt encoder: points and boxes to sparse tokens, masks to a dense map.
//!
//! ```text
//! pe(c)  = [sin(2 pi (2 c - 1) G), cos(2 pi (2 c - 1) G)]       c in [0, 1]^2 as (x, y), G [2, F] random, fixed
//! point  = pe((p + 0.5) / S) + point_embed[label]               label 0 or 1; -1: not_a_point_embed; -10: zero
//! corner = pe((p + 0.5) / S) + point_embed[2 or 3]              of a box
//! dense  = mask_embed(mask)  or  no_mask_embed everywhere
//! ```
//! Points without boxes get one more point of label -1, as the original does it. Coordinates are pixels of the
//! resized S x S image; the encoding is computed in f32 and rounded to the model's dtype at the end.
//!
//! Source: `SamPromptEncoder` in `modeling_sam.py`.

use super::validate::require_dtype;
use super::{SamConfig, SamPromptEncoderConfig};
use crate::module_tree;
use crate::nn::{module_in_evaluation, Conv2d, Embedding, Fixed, LayerNorm, Mode, Tied};
use crate::ops::{self, Activation};
use candle_core::{bail, DType, Result, Tensor, TensorId, D};
use candle_nn::{Init, VarBuilder};
use std::sync::{Arc, Mutex, PoisonError};

/// Label of a point that is none: it pads a prompt that has no box.
const NOT_A_POINT: f64 = -1.0;
/// The largest coordinate, 2^24: of larger numbers f32 has not each.
const FARTHEST: f32 = 16_777_216.0;
/// Label of a point that pads a shorter list of points in a batch: its embedding is zero.
const PADDING: f64 = -10.0;

/// Whether a coordinate is finite and no further from the image than f32 tells pixels apart.
pub(super) fn is_near(coordinate: f32) -> bool {
    coordinate.abs() <= FARTHEST
}

/// Random Fourier features of positions, shared by the image and the prompts.
///
/// [Example](crate::sam::SamMaskDecoder)
#[derive(Clone, Debug)]
pub struct SamPositionalEmbedding {
    /// The frequencies G, `[2, num_pos_feats]`.
    pub positional_embedding: Fixed,
    last_grid: LastGrid,
}

/// The last grid, with the frequencies and the side that it is made of.
type LastGrid = Arc<Mutex<Option<(TensorId, usize, Tensor)>>>;

module_tree!(SamPositionalEmbedding { positional_embedding });

impl SamPositionalEmbedding {
    /// With the frequencies of a `VarBuilder`, held fixed; a `VarMap` draws them from the standard normal distribution.
    ///
    /// # Errors
    /// - the dtype is none of f32, f16 and bf16;
    /// - the tensor is missing or has another shape.
    pub fn new(num_pos_feats: usize, vb: VarBuilder<'_>) -> Result<Self> {
        require_dtype(vb.dtype())?;
        let normal = Init::Randn { mean: 0.0, stdev: 1.0 };
        let frequencies =
            vb.get_with_hints((2, num_pos_feats), "positional_embedding", normal)?.detach();
        Ok(Self::from(Fixed(frequencies)))
    }

    /// Positions in `[0, 1]^2`, as (x, y): `[.., 2] -> [.., 2 num_pos_feats]`, in f32.
    pub fn forward(&self, positions: &Tensor) -> Result<Tensor> {
        let frequencies = self.positional_embedding.0.to_dtype(DType::F32)?;
        let mut dims = positions.dims().to_vec();
        let rows = positions.to_dtype(DType::F32)?.reshape(((), 2))?.affine(2.0, -1.0)?;
        let phases = (rows.matmul(&frequencies)? * std::f64::consts::TAU)?;
        if let Some(last) = dims.last_mut() {
            *last = 2 * frequencies.dim(1)?;
        }
        Tensor::cat(&[phases.sin()?, phases.cos()?], D::Minus1)?.reshape(dims)
    }

    /// The centres of an image's side x side patches: `[1, side, side, 2 num_pos_feats]`, in f32. Kept for the next
    /// call while the frequencies are fixed.
    pub fn grid(&self, side: usize) -> Result<Tensor> {
        let frequencies = &self.positional_embedding.0;
        if frequencies.track_op() || ops::prepares_graph() {
            return self.computed_grid(side);
        }
        let mut last = self.last_grid.lock().unwrap_or_else(PoisonError::into_inner);
        match &*last {
            Some((id, of, grid)) if (*id, *of) == (frequencies.id(), side) => Ok(grid.clone()),
            _ => {
                let grid = self.computed_grid(side)?;
                *last = Some((frequencies.id(), side, grid.clone()));
                Ok(grid)
            }
        }
    }

    fn computed_grid(&self, side: usize) -> Result<Tensor> {
        let device = self.positional_embedding.0.device();
        let centres: Vec<f32> = (0..side).map(|i| (i as f32 + 0.5) / side as f32).collect();
        let centres = Tensor::from_vec(centres, side, device)?;
        let x = centres.reshape((1, side))?.broadcast_as((side, side))?;
        let y = centres.reshape((side, 1))?.broadcast_as((side, side))?;
        self.forward(&Tensor::stack(&[x, y], 2)?)?.unsqueeze(0)
    }
}

impl From<Fixed> for SamPositionalEmbedding {
    fn from(positional_embedding: Fixed) -> Self {
        Self { positional_embedding, last_grid: LastGrid::default() }
    }
}

/// Shrinks a mask prompt to the image embedding's grid.
///
/// [Example](crate::sam::SamMaskDecoder)
#[derive(Clone, Debug)]
pub struct SamMaskEmbedding {
    /// 2x2, `1 -> mask_input_channels / 4`
    pub conv1: Conv2d,
    /// 2x2, `-> mask_input_channels`
    pub conv2: Conv2d,
    /// 1x1, `-> hidden_size`
    pub conv3: Conv2d,
    /// After `conv1`.
    pub layer_norm1: LayerNorm,
    /// After `conv2`.
    pub layer_norm2: LayerNorm,
    /// After each norm.
    pub activation: Activation,
}

module_tree!(SamMaskEmbedding { conv1, conv2, conv3, layer_norm1, layer_norm2 });

module_in_evaluation! {
    /// `[B, 4h, 4w, 1] -> [B, h, w, hidden_size]` in evaluation.
    SamMaskEmbedding,
}

impl SamMaskEmbedding {
    fn new(config: &SamPromptEncoderConfig, vb: VarBuilder<'_>) -> Result<Self> {
        let (wide, narrow) = (config.mask_input_channels, config.mask_input_channels / 4);
        let norm = |size, name| LayerNorm::load(size, config.layer_norm_eps, vb.pp(name));
        Ok(Self {
            conv1: Conv2d::load(1, narrow, 2, 2, vb.pp("conv1"))?,
            conv2: Conv2d::load(narrow, wide, 2, 2, vb.pp("conv2"))?,
            conv3: Conv2d::load(wide, config.hidden_size, 1, 1, vb.pp("conv3"))?,
            layer_norm1: norm(narrow, "layer_norm1")?,
            layer_norm2: norm(wide, "layer_norm2")?,
            activation: config.hidden_act.into(),
        })
    }

    /// `[B, 4h, 4w, 1] -> [B, h, w, hidden_size]`
    pub fn forward(&self, masks: &Tensor, mode: Mode) -> Result<Tensor> {
        let x = self.layer_norm1.forward(&self.conv1.forward(masks, mode)?)?;
        let x = self.conv2.forward(&self.activation.apply(&x)?, mode)?;
        let x = self.layer_norm2.forward(&x)?;
        self.conv3.forward(&self.activation.apply(&x)?, mode)
    }
}

/// The prompts of a batch, each optional.
///
/// [Example](crate::sam::SamMaskDecoder)
#[derive(Clone, Copy, Debug, Default)]
pub struct SamPrompts<'a> {
    /// `[B, P, N, 2]`: (x, y) of N points for each of P masks.
    pub input_points: Option<&'a Tensor>,
    /// `[B, P, N]`: 1 on the object, 0 off it, -1 not a point, -10 padding. All 1 if none.
    pub input_labels: Option<&'a Tensor>,
    /// `[B, P, 4]`: (x1, y1, x2, y2), one box for each of P masks.
    pub input_boxes: Option<&'a Tensor>,
    /// `[B, 1, 4h, 4w]`: logits of an earlier mask; a B of 1 serves every image.
    pub input_masks: Option<&'a Tensor>,
}

/// The prompt encoder. The frequencies it shares with the image belong to the model.
///
/// [Example](crate::sam::SamMaskDecoder)
#[derive(Clone, Debug)]
pub struct SamPromptEncoder {
    /// Frequencies of the prompts alone, where they are no longer those of the image.
    pub shared_embedding: Tied,
    /// For a mask prompt.
    pub mask_embed: SamMaskEmbedding,
    /// Instead of a mask prompt, `[1, hidden_size]`.
    pub no_mask_embed: Embedding,
    /// Embeddings of a point off the object, one on it, and a box's two corners.
    pub point_embed: Vec<Embedding>,
    /// Embedding of label -1, `[1, hidden_size]`.
    pub not_a_point_embed: Embedding,
    image_size: usize,
    grid_size: usize,
}

module_tree!(SamPromptEncoder {
    shared_embedding => "shared_embedding.positional_embedding",
    mask_embed,
    no_mask_embed,
    point_embed,
    not_a_point_embed,
});

impl SamPromptEncoder {
    /// With the tensors of a `VarBuilder`; the prompts share the image's frequencies.
    ///
    /// # Errors
    /// - the configuration is impossible, see [`SamConfig::validate`];
    /// - the dtype is none of f32, f16 and bf16;
    /// - a tensor is missing or has another shape.
    pub fn new(config: &SamConfig, vb: VarBuilder<'_>) -> Result<Self> {
        config.validate()?;
        require_dtype(vb.dtype())?;
        let config = &config.prompt_encoder_config;
        let embedding = |vb| Embedding::load(1, config.hidden_size, vb);
        let points =
            (0..config.num_point_embeddings).map(|i| embedding(vb.pp("point_embed").pp(i)));
        Ok(Self {
            shared_embedding: Tied::to("shared_image_embedding.positional_embedding"),
            mask_embed: SamMaskEmbedding::new(config, vb.pp("mask_embed"))?,
            no_mask_embed: embedding(vb.pp("no_mask_embed"))?,
            point_embed: points.collect::<Result<_>>()?,
            not_a_point_embed: embedding(vb.pp("not_a_point_embed"))?,
            image_size: config.image_size,
            grid_size: config.image_embedding_size(),
        })
    }

    /// Sparse tokens `[B, P, N, C]` (none without points and boxes) and the dense map `[B or 1, h or 1, w or 1, C]`.
    /// `shared` is the image's, for prompts without frequencies of their own.
    ///
    /// # Errors
    /// - a prompt's shape does not fit `batch` or the other prompts;
    /// - on the CPU, a label is none of the four, or a coordinate is no place near an image.
    ///
    /// On a GPU such a label gives a token of NaN, and no error: the host would have to wait for the GPU.
    pub fn forward(
        &self,
        prompts: &SamPrompts<'_>,
        shared: &SamPositionalEmbedding,
        batch: usize,
        mode: Mode,
    ) -> Result<(Option<Tensor>, Tensor)> {
        self.check(prompts, batch)?;
        let own = self.shared_embedding.own.clone();
        let own = own.map(SamPositionalEmbedding::from);
        let shared = own.as_ref().unwrap_or(shared);
        let mut sparse = vec![];
        if let Some(points) = prompts.input_points {
            let pad = prompts.input_boxes.is_none();
            sparse.push(self.embed_points(points, prompts.input_labels, pad, shared)?);
        }
        if let Some(boxes) = prompts.input_boxes {
            sparse.push(self.embed_boxes(boxes, shared)?);
        }
        let sparse = (!sparse.is_empty()).then(|| Tensor::cat(&sparse, 2)).transpose()?;
        let no_mask = &self.no_mask_embed.weight;
        let dense = match prompts.input_masks {
            Some(masks) => {
                let masks = masks.to_dtype(no_mask.dtype())?;
                self.mask_embed.forward(&masks.permute((0, 2, 3, 1))?, mode)?
            }
            None => no_mask.reshape((1, 1, 1, ()))?,
        };
        Ok((sparse, dense))
    }

    fn embed_points(
        &self,
        points: &Tensor,
        labels: Option<&Tensor>,
        pad: bool,
        shared: &SamPositionalEmbedding,
    ) -> Result<Tensor> {
        let (batch, count, _, _) = points.dims4()?;
        let mut centres = points.to_dtype(DType::F32)?.affine(1.0, 0.5)?;
        let mut labels = match labels {
            Some(labels) => labels.to_dtype(DType::F32)?,
            None => centres.narrow(3, 0, 1)?.squeeze(3)?.ones_like()?,
        };
        if pad {
            let (origin, none) = (centres.narrow(2, 0, 1)?, labels.narrow(2, 0, 1)?);
            centres = Tensor::cat(&[centres, origin.zeros_like()?], 2)?;
            labels = Tensor::cat(&[labels, (none.zeros_like()? + NOT_A_POINT)?], 2)?;
        }
        let labels = labels.reshape((batch, count, (), 1))?;
        let has_label = |label: f64| labels.eq(label)?.to_dtype(DType::F32);
        let (none, off, on) = (has_label(NOT_A_POINT)?, has_label(0.0)?, has_label(1.0)?);
        let (placed, unplaced) = ((&off + &on)?, (&none + has_label(PADDING)?)?);
        // 1 or 0; NaN for any other label, which a GPU cannot refuse without a wait.
        let placed = (&placed / (&placed + unplaced)?)?;
        let positions = shared.forward(&(centres / self.image_size as f64)?)?;
        let dtype = self.not_a_point_embed.weight.dtype();
        let mut tokens = positions.broadcast_mul(&placed)?.to_dtype(dtype)?;
        for (has_label, embedding) in [
            (none, &self.not_a_point_embed),
            (off, &self.point_embed[0]),
            (on, &self.point_embed[1]),
        ] {
            let chosen = ops::repeat(&embedding.weight, tokens.shape())?;
            tokens = (tokens + chosen.broadcast_mul(&has_label.to_dtype(dtype)?)?)?;
        }
        Ok(tokens)
    }

    fn embed_boxes(&self, boxes: &Tensor, shared: &SamPositionalEmbedding) -> Result<Tensor> {
        let (batch, count, _) = boxes.dims3()?;
        let corners = boxes.to_dtype(DType::F32)?.reshape((batch, count, 2, 2))?;
        let positions = (corners.affine(1.0, 0.5)? / self.image_size as f64)?;
        let embeddings = [&self.point_embed[2].weight, &self.point_embed[3].weight];
        let embeddings = Tensor::cat(&embeddings, 0)?;
        let positions = shared.forward(&positions)?.to_dtype(embeddings.dtype())?;
        ops::broadcast_add(&positions, &embeddings)
    }

    fn check(&self, prompts: &SamPrompts<'_>, batch: usize) -> Result<()> {
        let refuse = |name: &str, expected: String, tensor: &Tensor| {
            bail!("prompt_encoder: {name} must have shape {expected}, got {:?}", tensor.dims())
        };
        let coordinates = [prompts.input_points, prompts.input_boxes];
        for (name, tensor) in ["input_points", "input_boxes"].into_iter().zip(coordinates) {
            let Some(tensor) = tensor.filter(|tensor| tensor.device().is_cpu()) else { continue };
            let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            if let Some(value) = values.iter().find(|value| !is_near(**value)) {
                bail!("prompt_encoder: {name} must be pixels of the image, got {value:e}")
            }
        }
        let mut count = None;
        if let Some(points) = prompts.input_points {
            match *points.dims() {
                [b, p, n, 2] if b == batch && p > 0 && n > 0 => count = Some(p),
                _ => refuse("input_points", format!("[{batch}, P, N, 2]"), points)?,
            }
        }
        match (prompts.input_points, prompts.input_labels) {
            (Some(points), Some(labels)) if labels.dims() != &points.dims()[..3] => {
                refuse("input_labels", format!("{:?}", &points.dims()[..3]), labels)?
            }
            (None, Some(_)) => bail!("prompt_encoder: input_labels without input_points"),
            // A GPU would have to be waited for.
            (_, Some(labels)) if labels.device().is_cpu() => {
                let labels = labels.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
                let known = [1.0, 0.0, NOT_A_POINT as f32, PADDING as f32];
                if let Some(label) = labels.iter().find(|label| !known.contains(label)) {
                    bail!(
                        "prompt_encoder: input_labels must be 1, 0, -1 or -10, got {label}; corners of a box are \
                         input_boxes"
                    )
                }
            }
            _ => {}
        }
        if let Some(boxes) = prompts.input_boxes {
            match *boxes.dims() {
                [b, p, 4] if b == batch && p > 0 && count.unwrap_or(p) == p => {}
                _ => {
                    let count = count.map_or("P".to_string(), |count| count.to_string());
                    refuse("input_boxes", format!("[{batch}, {count}, 4]"), boxes)?
                }
            }
        }
        if let Some(masks) = prompts.input_masks {
            let side = 4 * self.grid_size;
            match *masks.dims() {
                [b, 1, h, w] if (b == batch || b == 1) && h == side && w == side => {}
                _ => refuse("input_masks", format!("[{batch}, 1, {side}, {side}]"), masks)?,
            }
        }
        if self.point_embed.len() < 4 {
            bail!("prompt_encoder: 4 point embeddings are needed, got {}", self.point_embed.len())
        }
        Ok(())
    }
}
