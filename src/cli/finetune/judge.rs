//! How well a model does on the held-out images, which the processes of a job divide.

use super::super::console::Console;
use super::pictures::picture;
use super::progress::Progress;
use crate::sam::{MaskGenerator, Rle, SamModel, SamProcessor};
use crate::train::{
    together, Communicator, Dataset, Evaluator, FlipRotate, HeldOutScores, KeptEmbeddings,
    MaskMatches, MaskScores, ObjectScores, PromptKind,
};
use crate::Error;
use candle_core::Device;
use image::RgbImage;
use serde::{Deserialize, Serialize};
use serde_json::json;
use std::collections::BTreeMap;

/// How a model is judged: by the held-out images.
pub struct Judge<'a> {
    /// The model's.
    pub processor: &'a SamProcessor,
    /// The images.
    pub held_out: &'a Dataset,
    /// Prompts of their objects.
    pub kind: PromptKind,
    /// Makes masks without a prompt, if they are judged.
    pub generator: Option<MaskGenerator>,
    /// Where the model is.
    pub device: &'a Device,
    /// Tells how far it is.
    pub console: Console,
    /// Who judges together.
    pub processes: &'a dyn Communicator,
}

/// How well one held-out image was segmented.
pub struct Verdict {
    /// The image.
    pub name: String,
    /// How well each of its objects was found.
    pub scores: Vec<ObjectScores>,
    /// Predicted and true IoU of each mask.
    pub predicted_ious: Vec<(f32, f64)>,
    /// How the masks found without a prompt match its objects, if there are some.
    pub matches: Option<MaskMatches>,
    /// The masks, of an image that is shown.
    pub shown: Option<Shown>,
}

/// The masks of an image that is shown.
pub struct Shown {
    /// The prompted ones, drawn.
    pub prompted: RgbImage,
    /// Those found without a prompt, with their scores.
    pub automatic: Vec<(f32, Rle)>,
}

impl Verdict {
    /// The IoU of each object.
    pub fn ious(&self) -> Vec<f64> {
        self.scores.iter().map(|scores| scores.iou).collect()
    }
}

/// The scores of all images together.
pub fn scores(verdicts: &[Verdict]) -> HeldOutScores {
    let objects = ObjectScores::mean(verdicts.iter().flat_map(|verdict| &verdict.scores));
    let matches: Vec<&MaskMatches> = verdicts.iter().flat_map(|v| &v.matches).collect();
    let masks = (!matches.is_empty()).then(|| MaskScores::of(matches));
    HeldOutScores { objects, masks }
}

impl Judge<'_> {
    /// Prompts every object of the held-out images; the first `shown` images are drawn. `kept` has the images'
    /// embeddings by this model.
    pub fn verdicts(
        &self,
        sam: &SamModel,
        kept: Option<&KeptEmbeddings<'_>>,
        shown: usize,
    ) -> anyhow::Result<Vec<Verdict>> {
        let Self { processor, held_out, kind, device, console, processes, ref generator } = *self;
        let generator = generator.as_ref();
        let evaluator = Evaluator { model: sam, processor, kind, device, generator };
        let progress = Progress::new(held_out.len(), console);
        let verdict = |index: usize| {
            let sample = held_out.load(index)?;
            let objects = sample.instances.len();
            let step = |done| progress.at(index, done, objects);
            let found = match kept {
                Some(kept) => {
                    let embedding = kept.get(index, FlipRotate::NONE, &sample)?;
                    evaluator.evaluate_embedded(&sample, &embedding, step)?
                }
                None => evaluator.evaluate(&sample, step)?,
            };
            let prompted = (index < shown).then(|| picture(&sample, &found));
            let (automatic, matches) =
                found.automatic.map(|automatic| (automatic.masks, automatic.matches)).unzip();
            let shown = prompted.map(|prompted| {
                let automatic = automatic.unwrap_or_default();
                Shown { prompted, automatic }
            });
            let (scores, predicted_ious) = (found.scores, found.predicted_ious);
            Ok((index, Verdict { name: sample.name, scores, predicted_ious, matches, shown }))
        };
        let share = |index: &usize| index % processes.size() == processes.rank();
        let own =
            (0..held_out.len()).filter(share).map(verdict).collect::<anyhow::Result<Vec<_>>>();
        progress.end();
        if processes.size() == 1 {
            return Ok(own?.into_iter().map(|(_, verdict)| verdict).collect());
        }
        let to_bytes = |own: &Vec<(usize, Verdict)>| {
            json!(own.iter().map(Told::of).collect::<Vec<_>>()).to_string().into_bytes()
        };
        let (_, told) = together(processes, own, to_bytes)?;
        let mut all: BTreeMap<usize, Verdict> = BTreeMap::new();
        for (rank, told) in told.iter().enumerate() {
            let told = serde_json::from_slice::<Vec<Told>>(told);
            let told = told.map_err(|e| Error::Rank { rank, message: e.to_string() })?;
            all.extend(told.into_iter().map(|told| (told.index, told.verdict())));
        }
        Ok(all.into_values().collect())
    }
}

/// A verdict as processes tell it, with the bits of its numbers.
#[derive(Serialize, Deserialize)]
struct Told {
    index: usize,
    name: String,
    scores: Vec<[u64; ObjectScores::NAMES.len()]>,
    predicted_ious: Vec<(u32, u64)>,
    matches: Option<(usize, Vec<(u32, u16)>)>,
    /// Width and pixels of the picture; masks with their scores, sizes and run lengths.
    shown: Option<(u32, Vec<u8>, Vec<ToldMask>)>,
}

type ToldMask = (u32, (u32, u32), Vec<u32>);

impl Told {
    fn of((index, verdict): &(usize, Verdict)) -> Self {
        let Verdict { name, scores, predicted_ious, matches, shown } = verdict;
        let matches = matches.as_ref().map(|MaskMatches { objects, found }| {
            (*objects, found.iter().map(|(score, ious)| (score.to_bits(), *ious)).collect())
        });
        let mask = |(score, mask): &(f32, Rle)| (score.to_bits(), mask.size, mask.counts.clone());
        let shown = shown.as_ref().map(|Shown { prompted, automatic }| {
            (prompted.width(), prompted.as_raw().clone(), automatic.iter().map(mask).collect())
        });
        let pair = |(predicted, found): &(f32, f64)| (predicted.to_bits(), found.to_bits());
        Self {
            index: *index,
            name: name.clone(),
            scores: scores.iter().map(|scores| scores.values().map(f64::to_bits)).collect(),
            predicted_ious: predicted_ious.iter().map(pair).collect(),
            matches,
            shown,
        }
    }

    fn verdict(self) -> Verdict {
        let scores = |bits: [u64; ObjectScores::NAMES.len()]| {
            ObjectScores::from_values(bits.map(f64::from_bits))
        };
        let matches = self.matches.map(|(objects, found)| {
            let mask = |(score, ious)| (f32::from_bits(score), ious);
            MaskMatches { objects, found: found.into_iter().map(mask).collect() }
        });
        let shown = self.shown.and_then(|(width, pixels, masks)| {
            let height = pixels.len() as u32 / (3 * width).max(1);
            let mask = |(score, size, counts)| (f32::from_bits(score), Rle { size, counts });
            let automatic = masks.into_iter().map(mask).collect();
            Some(Shown { prompted: RgbImage::from_raw(width, height, pixels)?, automatic })
        });
        let pair = |(predicted, found)| (f32::from_bits(predicted), f64::from_bits(found));
        Verdict {
            name: self.name,
            scores: self.scores.into_iter().map(scores).collect(),
            predicted_ious: self.predicted_ious.into_iter().map(pair).collect(),
            matches,
            shown,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_are_told_bit_for_bit() -> anyhow::Result<()> {
        let mask = Rle::from_mask(&[false, true, true, false, true, false], (2, 3))?;
        let verdict = Verdict {
            name: "a \"name\"".into(),
            scores: vec![ObjectScores::from_values([
                0.1,
                1.0 / 3.0,
                0.7,
                0.2,
                0.6,
                f64::MIN_POSITIVE,
            ])],
            predicted_ious: vec![(0.1, 0.3), (f32::INFINITY, 2.0 / 3.0)],
            matches: Some(MaskMatches { objects: 2, found: vec![(-0.25, 0), (0.1, 1023)] }),
            shown: Some(Shown {
                prompted: RgbImage::from_fn(2, 3, |x, y| image::Rgb([x as u8, y as u8, 255])),
                automatic: vec![(0.3, mask)],
            }),
        };
        let told = json!(Told::of(&(5, verdict))).to_string();
        let heard: Told = serde_json::from_str(&told)?;
        assert_eq!(heard.index, 5);
        let again = json!(Told::of(&(5, heard.verdict()))).to_string();
        assert_eq!(again, told);
        for part in ["[-0.25", "0.1]"] {
            assert!(!told.contains(part), "numbers are told as bits: {told}");
        }
        Ok(())
    }
}
