//! Embeddings of images, computed once for a run that trains nothing of the image encoder.
//!
//! ```text
//! an image, as it is or turned  ->  [1, C, h, w]     in memory, or a file each in a folder
//! ```
//! An embedding is computed when a step first draws its image. So a short run computes no more than it needs, and a
//! resumed one no more than it lost. The files are those of [`EmbeddingStore`]: a damaged one, or one of another model
//! or adapter, is computed anew.

use super::{FlipRotate, Sample};
use crate::sam::{EmbeddingStore, ImageEmbedding, SamModel, SamPredictor, SamProcessor};
use crate::Result;
use candle_core::Tensor;
use image::DynamicImage;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

/// The embeddings of a data set's images.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_sam_lora::sam::{AttentionKind, SamModel, SamProcessor};
/// use candle_sam_lora::train::{Dataset, DatasetOptions, FlipRotate, KeptEmbeddings};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let model = SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Fused, DType::F32, &Device::Cpu)?;
/// let processor = SamProcessor::load("assets/tiny-sam", 128)?;
/// let (images, masks) = ("assets/photos/coins/train/images", "assets/photos/coins/train/masks");
/// let sample = Dataset::open(images, masks, &DatasetOptions::min_area(20))?.load(0)?;
/// let kept = KeptEmbeddings::in_memory(&model, &processor); // for BatchSource::embeddings
/// let embedding = kept.get(0, FlipRotate::NONE, &sample)?.tensor; // the encoder runs
/// let again = kept.get(0, FlipRotate::NONE, &sample)?.tensor; // the encoder does not
/// assert_eq!(embedding.dims(), again.dims());
/// assert_eq!(kept.bytes(1, false)?, 4 * embedding.elem_count() as u64);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct KeptEmbeddings<'a> {
    predictor: SamPredictor<'a>,
    store: Option<EmbeddingStore>,
    keeps_turned: bool,
    memory: Mutex<BTreeMap<Key, Tensor>>,
}

/// Number, way, width and checksum of the pixels: another data set has other images of the same numbers.
type Key = (usize, FlipRotate, [u32; 2]);

impl<'a> KeptEmbeddings<'a> {
    /// In memory.
    pub fn in_memory(model: &'a SamModel, processor: &SamProcessor) -> Self {
        let predictor = SamPredictor::with_processor(model, processor.clone());
        Self { predictor, store: None, keeps_turned: true, memory: Mutex::default() }
    }

    /// In files of a folder, which is made when it is needed. Processes and runs may share it.
    pub fn in_folder(
        model: &'a SamModel,
        processor: &SamProcessor,
        folder: impl Into<PathBuf>,
    ) -> Self {
        let store = Some(EmbeddingStore::in_folder(folder));
        Self { store, ..Self::in_memory(model, processor) }
    }

    /// Computes those of turned and mirrored images in every step. These are seven of eight images of a run that
    /// augments them.
    pub fn recompute_turned(self) -> Self {
        Self { keeps_turned: false, ..self }
    }

    /// Bytes of the embeddings of `images` images.
    ///
    /// # Errors
    /// - the model has no embeddings.
    pub fn bytes(&self, images: usize, augmented: bool) -> Result<u64> {
        let ways = if augmented && self.keeps_turned { FlipRotate::COUNT } else { 1 };
        Ok((images * ways) as u64 * self.predictor.embedding_bytes()?)
    }

    /// The embedding `[1, C, h, w]` of the image of a number, which is turned in this way in `sample`.
    ///
    /// # Errors
    /// - as [`SamPredictor::embed`];
    /// - a file cannot be read or written.
    pub fn get(&self, index: usize, way: FlipRotate, sample: &Sample) -> Result<ImageEmbedding> {
        let (width, height) = sample.image.dimensions();
        let frame = self.predictor.processor().frame(height as usize, width as usize)?;
        let image = || DynamicImage::ImageRgb8(sample.image.clone());
        if way != FlipRotate::NONE && !self.keeps_turned {
            return self.predictor.embed(&image());
        }
        if let Some(store) = &self.store {
            let kept = store.get_or_embed_pixels(&self.predictor, &sample.name, &sample.image)?;
            return Ok(kept.embedding);
        }
        let key = (index, way, [width, crc32c::crc32c(sample.image.as_raw())]);
        let memory = || self.memory.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kept) = memory().get(&key) {
            return Ok(ImageEmbedding { tensor: kept.clone(), hq_features: None, frame });
        }
        let computed = self.predictor.embed(&image())?.tensor;
        memory().insert(key, computed.clone());
        Ok(ImageEmbedding { tensor: computed, hq_features: None, frame })
    }
}
