//! Embeddings that are computed once and kept, beside their images or in a folder.
//!
//! ```text
//! beside      photo.jpg -> photo.jpg.embedding.safetensors
//! in a folder photo.jpg -> FOLDER/photo.jpg.<checksum of the image>.embedding.safetensors
//!             pixels    -> FOLDER/<name>.<checksum of the pixels>.embedding.safetensors
//! ```

use super::embedding::{load, EmbeddingOrigin, EmbeddingPrecision};
use super::{ImageEmbedding, ReadOptions, SamPredictor};
use crate::files::{self, Checksum};
use crate::{Error, Result};
use candle_core::DType;
use image::{DynamicImage, RgbImage};
use serde::Serialize;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

/// Keeps embeddings in files: a file is read if image, model, adapters, processor and precision agree, else computed
/// anew.
///
/// ```
/// use candle_core::{DType, Device};
/// use candle_sam_lora::sam::{AttentionKind, EmbeddingStore, SamModel, SamPredictor};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let model = SamModel::from_pretrained("assets/tiny-sam", AttentionKind::Fused, DType::F32, &Device::Cpu)?;
/// let predictor = SamPredictor::new(&model);
/// # let folder = tempfile::tempdir().expect("a folder");
/// # let image = folder.path().join("photo.png");
/// # image::DynamicImage::new_rgb8(32, 24).save(&image).expect("saved");
/// let store = EmbeddingStore::beside();
/// let first = store.get_or_embed(&predictor, &image)?;
/// assert_eq!(first.computed.as_deref(), Some("there was no file"));
/// assert_eq!(store.get_or_embed(&predictor, &image)?.computed, None);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default)]
pub struct EmbeddingStore {
    folder: Option<PathBuf>,
    options: ReadOptions,
    precision: EmbeddingPrecision,
}

/// An embedding from a store.
///
/// [Example](crate::sam::EmbeddingStore)
#[derive(Clone, Debug)]
pub struct Embedded {
    /// The embedding, in the model's dtype.
    pub embedding: ImageEmbedding,
    /// Where it is kept.
    pub path: PathBuf,
    /// Why it was computed, in one line; none if it was read.
    pub computed: Option<String>,
}

impl EmbeddingStore {
    /// Beside the images.
    pub fn beside() -> Self {
        Self::default()
    }

    /// In a folder, which is made when it is needed.
    pub fn in_folder(folder: impl Into<PathBuf>) -> Self {
        Self { folder: Some(folder.into()), ..Self::default() }
    }

    /// How images are read; [`ReadOptions::default`] otherwise.
    pub fn with_options(self, options: ReadOptions) -> Self {
        Self { options, ..self }
    }

    /// The numbers in the files; [`EmbeddingPrecision::Exact`] otherwise. A computed embedding is rounded as one that
    /// is read.
    pub fn with_precision(self, precision: EmbeddingPrecision) -> Self {
        Self { precision, ..self }
    }

    /// The embedding of an image file. A file that does not agree, or is damaged, is computed anew and replaced:
    /// [`Embedded::computed`] and the log say why.
    ///
    /// # Errors
    /// - as [`ReadOptions::read`] and [`SamPredictor::embed`];
    /// - the embedding cannot be read for another reason than its content, or not be written.
    pub fn get_or_embed(
        &self,
        predictor: &SamPredictor<'_>,
        image: impl AsRef<Path>,
    ) -> Result<Embedded> {
        let image = image.as_ref();
        let bytes = std::fs::read(image).map_err(|e| Error::io(image, e))?;
        let origin = Self::origin(predictor, json(&self.options)?, &[&bytes])?;
        let picture = || Ok(self.options.read_bytes(image, bytes)?.image);
        self.kept(predictor, (image, &origin), picture)
    }

    /// The embedding of pixels, whatever file they came from: a turned image, or the entry of an archive. Files that
    /// are there serve as in [`get_or_embed`](Self::get_or_embed).
    ///
    /// # Errors
    /// - the store has no folder: pixels lie beside nothing;
    /// - as [`get_or_embed`](Self::get_or_embed).
    pub fn get_or_embed_pixels(
        &self,
        predictor: &SamPredictor<'_>,
        name: &str,
        image: &RgbImage,
    ) -> Result<Embedded> {
        if self.folder.is_none() {
            return Err(Error::config("embeddings of pixels need a store in a folder"));
        }
        let size = [image.width(), image.height()].map(u32::to_le_bytes);
        let bytes = [size.as_flattened(), image.as_raw()];
        let origin = Self::origin(predictor, json(&"pixels")?, &bytes)?;
        let picture = || Ok(DynamicImage::ImageRgb8(image.clone()));
        self.kept(predictor, (Path::new(name), &origin), picture)
    }

    /// The embedding of a name and an origin: that in its file, or else that of `picture`.
    fn kept(
        &self,
        predictor: &SamPredictor<'_>,
        (image, origin): (&Path, &EmbeddingOrigin),
        picture: impl FnOnce() -> Result<DynamicImage>,
    ) -> Result<Embedded> {
        let path = self.path(image, origin);
        let computed = match self.read(predictor, &path, origin) {
            Ok(Ok(embedding)) => return Ok(Embedded { embedding, path, computed: None }),
            Ok(Err(reason)) => reason,
            Err(Error::Io { source, .. }) if source.kind() == ErrorKind::NotFound => {
                "there was no file".into()
            }
            Err(Error::File { message, .. }) => message,
            Err(error) => return Err(error),
        };
        tracing::info!("{}: embedding computed: {computed}", image.display());
        let mut embedding = predictor.embed(&picture()?)?;
        if let Some(folder) = &self.folder {
            files::create_dir(folder)?;
        }
        embedding.save(&path, origin, self.precision)?;
        let dtype = embedding.tensor.dtype();
        embedding.tensor =
            embedding.tensor.to_dtype(self.precision.dtype(dtype))?.to_dtype(dtype)?;
        Ok(Embedded { embedding, path, computed: Some(computed) })
    }

    /// Origin of the embedding of an image's bytes, which are read as `reading` says.
    fn origin(
        predictor: &SamPredictor<'_>,
        reading: String,
        bytes: &[&[u8]],
    ) -> Result<EmbeddingOrigin> {
        let mut image = Checksum::new();
        bytes.iter().for_each(|bytes| image.add("image", bytes));
        let identity = predictor.identity()?;
        Ok(EmbeddingOrigin {
            image: image.to_string(),
            reading,
            processor: json(predictor.processor())?,
            model: identity.model,
            adapter: identity.adapter,
        })
    }

    fn path(&self, image: &Path, origin: &EmbeddingOrigin) -> PathBuf {
        let name = image.file_name().unwrap_or_default().to_string_lossy();
        match &self.folder {
            None => image.with_file_name(format!("{name}.embedding.safetensors")),
            // Images of one name from several folders have files of their own.
            Some(folder) => folder.join(format!("{name}.{}.embedding.safetensors", origin.image)),
        }
    }

    /// The embedding in a file, or why it does not serve.
    fn read(
        &self,
        predictor: &SamPredictor<'_>,
        path: &Path,
        origin: &EmbeddingOrigin,
    ) -> Result<std::result::Result<ImageEmbedding, String>> {
        let (dtype, device) = predictor.place();
        let file = load(path, device)?;
        if let Some(difference) = file.origin.difference(origin) {
            return Ok(Err(difference));
        }
        let expected = (self.precision.dtype(dtype), dtype);
        let found = (file.stored, file.embedding.tensor.dtype());
        if found != expected {
            let said = |(stored, computed): (DType, DType)| {
                format!("{} computed in {}", stored.as_str(), computed.as_str())
            };
            let (expected, found) = (said(expected), said(found));
            return Ok(Err(format!(
                "the precision is another: expected {expected}, found {found}"
            )));
        }
        let (shape, dims) = (predictor.embedding_shape()?, file.embedding.tensor.dims());
        match dims == shape {
            true => Ok(Ok(file.embedding)),
            false => Ok(Err(format!("the shape is another: expected {shape:?}, found {dims:?}"))),
        }
    }
}

fn json(value: &impl Serialize) -> Result<String> {
    serde_json::to_string(value).map_err(|e| Error::Config(e.to_string()))
}
