//! Prompts that answer the model, as a user corrects it: a point where its mask is wrong, and the mask itself.
//!
//! ```text
//! first round   a point or a box                         -> the single mask, and alternatives where they are trained
//! each other    + a point where the last mask is wrong: on the object in a false negative, off it in a false positive
//!               + with a probability, the last mask's logits, without gradient
//! mask rounds   the logits alone are new: one is the last round, others come at random places
//! ```
//! The single mask is corrected. A mask without a fault gets one more point on the object. All is drawn from (seed,
//! part).
//!
//! Source: Kirillov et al., "Segment Anything", 2023, appendix A: eight points, two mask rounds, logits in every round.

use super::StepRng;
use crate::nn::Mode;
use crate::ops;
use crate::sam::{SamInput, SamModel, SamOutput};
use crate::{Error, Result};
use candle_core::{bail, DType, Device, Tensor};
use serde::Serialize;

/// How often a prompt is corrected. Each round is one pass of the decoder; the encoder runs once for all.
///
/// [Example](crate::train::Batch)
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Corrections {
    /// Rounds with a new point.
    pub points: usize,
    /// Probability that such a round gets the logits of the last mask.
    pub mask_probability: f64,
    /// Rounds in which these logits alone are new.
    pub mask_rounds: usize,
}

/// A round after the first.
///
/// [Example](crate::train::Batch)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Round {
    /// Whether a point is added.
    pub point: bool,
    /// Whether the logits of the last mask are given.
    pub mask: bool,
}

impl Corrections {
    /// The first prompt alone.
    pub const NONE: Self = Self { points: 0, mask_probability: 0.0, mask_rounds: 0 };

    /// Refuses a probability outside of 0..1.
    ///
    /// # Errors
    /// As said.
    pub fn validate(&self) -> Result<()> {
        if !(0.0..=1.0).contains(&self.mask_probability) {
            let message =
                format!("the probability {} of masks is not in [0, 1]", self.mask_probability);
            return Err(Error::config(message));
        }
        Ok(())
    }

    /// The rounds of a part.
    pub fn draw(&self, draws: &mut StepRng) -> Vec<Round> {
        let with_point = |_| Round { point: true, mask: draws.uniform() < self.mask_probability };
        let mut rounds: Vec<Round> = (0..self.points).map(with_point).collect();
        let mask_round = Round { point: false, mask: true };
        for _ in 1..self.mask_rounds {
            rounds.insert(draws.below(rounds.len() + 1), mask_round);
        }
        rounds.extend((self.mask_rounds > 0).then_some(mask_round));
        rounds
    }
}

/// The P objects of an image, in the part of the low-resolution mask that shows the image.
///
/// [Example](crate::train::Batch)
#[derive(Clone, Debug)]
pub struct ObjectMasks {
    /// `[P, rows, cols]` of 0 and 1.
    pub targets: Tensor,
    /// 1 where a target is to be ignored, of its shape; `None` where nothing is.
    pub ignored: Option<Tensor>,
}

/// Objects that are prompted alike, P in each of G images.
///
/// [Example](crate::train::Batch)
#[derive(Clone, Debug)]
pub struct PromptedObjects {
    /// The images' places in their batch.
    pub images: Vec<usize>,
    /// The first prompts: points `[G, P, N, 2]` with labels, or boxes `[G, P, 4]`.
    pub prompts: SamInput,
    /// The objects of each image.
    pub objects: Vec<ObjectMasks>,
}

/// The way of a conversation with the model.
pub(super) struct Script<'a> {
    /// The rounds after the first.
    pub rounds: &'a [Round],
    /// Whether the first round gives the alternatives, too, after the single mask.
    pub alternatives: bool,
    /// Mode of the decoder.
    pub mode: Mode,
    /// Draws of the points.
    pub draws: &'a mut StepRng,
}

impl PromptedObjects {
    /// Prompts the model, corrects it, and hands the output of each round to `round`, G images with P prompts each.
    /// `embeddings` are those of the G images.
    pub(super) fn converse(
        &self,
        model: &SamModel,
        embeddings: &Tensor,
        script: Script<'_>,
        mut round: impl FnMut(&SamOutput) -> candle_core::Result<()>,
    ) -> candle_core::Result<()> {
        let Script { rounds, alternatives, mode, draws } = script;
        let image_size = model.config().vision_config.image_size;
        let masks =
            if alternatives { model.mask_decoder.output_hypernetworks_mlps.len() } else { 1 };
        let mut input =
            SamInput { image_embeddings: Some(embeddings.clone()), ..self.prompts.clone() };
        let mut output = model.forward_masks(&input, 0..masks, mode)?;
        round(&output)?;
        if rounds.is_empty() {
            return Ok(());
        }
        let (images, prompts, _) = output.iou_scores.dims3()?;
        input = apart(input, prompts)?;
        for Round { point, mask } in rounds {
            let logits = output.pred_masks.detach().narrow(2, 0, 1)?.flatten(0, 2)?;
            if *point {
                let (points, labels) = self.corrections(&logits, image_size, draws)?;
                input.input_points = Some(appended(input.input_points, points)?);
                input.input_labels = Some(appended(input.input_labels, labels)?);
            }
            input.input_masks = mask.then(|| logits.unsqueeze(1)).transpose()?;
            let SamOutput { iou_scores, pred_masks } = model.forward_masks(&input, 0..1, mode)?;
            let (_, _, _, height, width) = pred_masks.dims5()?;
            output = SamOutput {
                iou_scores: iou_scores.reshape((images, prompts, 1))?,
                pred_masks: pred_masks.reshape((images, prompts, 1, height, width))?,
            };
            round(&output)?;
        }
        Ok(())
    }

    /// A point for each object where its logits `[G P, 4h, 4w]` are wrong, in pixels of the model's input:
    /// `[G P, 1, 1, 2]` and labels `[G P, 1, 1]`.
    fn corrections(
        &self,
        logits: &Tensor,
        image_size: usize,
        draws: &mut StepRng,
    ) -> candle_core::Result<(Tensor, Tensor)> {
        let step = image_size as f64 / logits.dim(2)? as f64;
        let cpu = logits.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let (mut points, mut labels) = (vec![], vec![]);
        for (index, ObjectMasks { targets, ignored }) in self.objects.iter().enumerate() {
            let (count, rows, cols) = targets.dims3()?;
            let ignored = ignored.as_ref().map(flat).transpose()?;
            for object in 0..count {
                let found =
                    cpu.get(index * count + object)?.narrow(0, 0, rows)?.narrow(1, 0, cols)?;
                let (found, truth) = (flat(&found)?, flat(&targets.get(object)?)?);
                let inside = |place: &usize| truth[*place] > 0.5;
                let counts = |place: &usize| match &ignored {
                    Some(ignored) => ignored[object * rows * cols + place] == 0.0,
                    None => true,
                };
                let wrong = |place: &usize| counts(place) && (found[*place] > 0.0) != inside(place);
                let mut pool: Vec<usize> = (0..rows * cols).filter(wrong).collect();
                if pool.is_empty() {
                    pool = (0..rows * cols).filter(inside).collect();
                }
                let place = pool.get(draws.below(pool.len().max(1))).copied().unwrap_or(0);
                let centre = |index: usize| ((index as f64 + 0.5) * step - 0.5) as f32;
                points.extend([centre(place % cols), centre(place / cols)]);
                labels.push(f32::from(u8::from(inside(&place))));
            }
        }
        let count = labels.len();
        let points = Tensor::from_vec(points, (count, 1, 1, 2), logits.device())?;
        Ok((points, Tensor::from_vec(labels, (count, 1, 1), logits.device())?))
    }
}

fn flat(tensor: &Tensor) -> candle_core::Result<Vec<f32>> {
    tensor.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()
}

/// With one more point each.
fn appended(before: Option<Tensor>, new: Tensor) -> candle_core::Result<Tensor> {
    match before {
        Some(before) => Tensor::cat(&[before.to_dtype(new.dtype())?, new], 2),
        None => Ok(new),
    }
}

/// The input `[G, P, ..]` as `[G P, 1, ..]`, each prompt with an image of its own: a model takes one mask an image.
fn apart(input: SamInput, prompts: usize) -> candle_core::Result<SamInput> {
    let split = |tensor: Option<Tensor>| {
        tensor.map(|tensor| tensor.flatten(0, 1)?.unsqueeze(1)).transpose()
    };
    let Some(embeddings) = &input.image_embeddings else { bail!("prompts: no image embeddings") };
    let dims = embeddings.dims();
    let wide = [&[dims[0], prompts], &dims[1..]].concat();
    let embeddings = ops::repeat(&embeddings.unsqueeze(1)?, wide)?.flatten(0, 1)?;
    Ok(SamInput {
        image_embeddings: Some(embeddings),
        input_points: split(input.input_points)?,
        input_labels: split(input.input_labels)?,
        input_boxes: split(input.input_boxes)?,
        ..input
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mask_rounds_come_last_and_anywhere() {
        let sam = Corrections { points: 8, mask_probability: 1.0, mask_rounds: 2 };
        let mut places = std::collections::BTreeSet::new();
        for part in 0..200 {
            let rounds = sam.draw(&mut StepRng::new(1, "corrections", part));
            assert_eq!((rounds.len(), rounds.iter().filter(|round| round.point).count()), (10, 8));
            assert!(!rounds[9].point && rounds.iter().all(|round| round.mask));
            places.extend(rounds[..9].iter().position(|round| !round.point));
        }
        assert_eq!(places.len(), 9);
        let mut draws = StepRng::new(1, "corrections", 0);
        assert!(Corrections::NONE.draw(&mut draws).is_empty());
        let half = Corrections { points: 400, mask_probability: 0.5, mask_rounds: 0 };
        let masks = half.draw(&mut draws).iter().filter(|round| round.mask).count();
        assert!((160..240).contains(&masks), "{masks} of 400 rounds have a mask");
    }

    /// Points lie on faults, labelled as what is missing or too much, and never on what is ignored.
    #[test]
    fn corrections_answer_the_faults() -> candle_core::Result<()> {
        let cpu = &Device::Cpu;
        let map = |inside: fn(usize, usize) -> bool| {
            let value = |i: usize| f32::from(u8::from(inside(i % 6, i / 6)));
            Tensor::from_vec((0..30).map(value).collect::<Vec<f32>>(), (1, 5, 6), cpu)
        };
        let targets = map(|x, y| (1..4).contains(&x) && (1..4).contains(&y))?;
        let found = map(|x, y| (3..6).contains(&x) && (1..4).contains(&y))?;
        let ignored = map(|x, _| x == 5)?;
        let shown = (found.affine(2.0, -1.0)?.pad_with_zeros(1, 0, 3)?).pad_with_zeros(2, 0, 2)?;
        let right =
            (targets.affine(2.0, -1.0)?.pad_with_zeros(1, 0, 3)?).pad_with_zeros(2, 0, 2)?;
        let objects = ObjectMasks { targets, ignored: Some(ignored) };
        let objects = PromptedObjects {
            images: vec![0],
            prompts: SamInput::default(),
            objects: vec![objects],
        };
        let mut seen = std::collections::BTreeSet::new();
        for step in 0..200 {
            let mut draws = StepRng::new(2, "corrections", step);
            let (points, labels) = objects.corrections(&shown, 32, &mut draws)?;
            let point = points.flatten_all()?.to_vec1::<f32>()?;
            let label = labels.flatten_all()?.to_vec1::<f32>()?[0];
            // The mask's 8 pixels are the image's 32.
            let [x, y] = [(point[0] + 0.5) / 4.0, (point[1] + 0.5) / 4.0];
            assert_eq!([x.fract(), y.fract()], [0.5, 0.5]);
            seen.insert((x as usize, y as usize, label as u8));
            let (points, labels) = objects.corrections(&right, 32, &mut draws)?;
            let point = points.flatten_all()?.to_vec1::<f32>()?;
            assert!(point.iter().all(|value| (4.0..16.0).contains(value)), "{point:?}");
            assert_eq!(labels.flatten_all()?.to_vec1::<f32>()?, [1.0]);
        }
        let expected = (1..4).flat_map(|y| [(1, y, 1), (2, y, 1), (4, y, 0)]);
        assert_eq!(seen, expected.collect());
        Ok(())
    }
}
