//! Embeddings of images as files.
//!
//! ```text
//! tensors     "embedding" [1, C, h, w] in the dtype of computation, or rounded to f16 or bf16
//! metadata    "embedding": "<checksum> <JSON: version, origin, original, resized, dtype>", see files/sealed.rs
//! ```

use super::{Frame, ImageEmbedding};
use crate::files::{Seal, TensorFile};
use crate::{Error, Result};
use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use std::collections::BTreeMap;
use std::path::Path;
use std::str::FromStr;

/// The version of the format.
const VERSION: u32 = 1;
const SEAL: Seal = Seal { key: "embedding", what: "an image embedding" };
const TENSOR: &str = "embedding";

/// The numbers that a file holds.
///
/// [Example](crate::sam::EmbeddingStore)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum EmbeddingPrecision {
    /// Those that the encoder computed, bit for bit.
    #[default]
    Exact,
    /// Rounded to 11 significant bits: half the size of f32, relative error at most 2^-11.
    F16,
    /// Rounded to 8 significant bits: half the size of f32, relative error at most 2^-8.
    Bf16,
}

impl EmbeddingPrecision {
    /// The dtype in a file of an embedding that was computed in `computed`.
    pub(super) fn dtype(self, computed: DType) -> DType {
        match self {
            Self::Exact => computed,
            Self::F16 => DType::F16,
            Self::Bf16 => DType::BF16,
        }
    }
}

/// The inputs of an embedding: image, model and adapter. Equal origins mean equal embeddings, up to the rounding of
/// another machine.
///
/// An attention of your own is known by its tensors alone: a change of its code does not change the origin.
///
/// [Example](crate::sam::EmbeddingStore)
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct EmbeddingOrigin {
    /// Checksum of the image file's bytes.
    pub image: String,
    /// The [`ReadOptions`](super::ReadOptions) as JSON. Text, because numbers read from JSON may differ in the last
    /// bit.
    pub reading: String,
    /// The [`SamProcessor`](super::SamProcessor) as JSON.
    pub processor: String,
    /// Checksum of the image encoder's configuration and tensors.
    pub model: String,
    /// Checksum of the active adapters of the image encoder; none without any.
    pub adapter: Option<String>,
}

impl EmbeddingOrigin {
    /// The first thing that differs, in one line; none between equal origins.
    pub fn difference(&self, expected: &Self) -> Option<String> {
        let adapter = |origin: &Self| origin.adapter.clone().unwrap_or("none".into());
        let pairs = [
            ("image", self.image.clone(), expected.image.clone()),
            ("model", self.model.clone(), expected.model.clone()),
            ("adapter", adapter(self), adapter(expected)),
            ("processor", self.processor.clone(), expected.processor.clone()),
            ("reading of the image", self.reading.clone(), expected.reading.clone()),
        ];
        let differs = pairs.into_iter().find(|(_, found, expected)| found != expected);
        differs.map(|(what, found, expected)| {
            format!("the {what} is another: expected {expected}, found {found}")
        })
    }
}

#[derive(Serialize, Deserialize)]
struct Header {
    version: u32,
    origin: EmbeddingOrigin,
    /// Height and width, see [`Frame`].
    original: (usize, usize),
    resized: (usize, usize),
    /// The dtype of computation.
    dtype: String,
}

/// An embedding as a file has it.
pub(super) struct StoredEmbedding {
    pub embedding: ImageEmbedding,
    pub origin: EmbeddingOrigin,
    /// The dtype in the file.
    pub stored: DType,
}

impl ImageEmbedding {
    /// Writes the embedding, or leaves what was there.
    ///
    /// # Errors
    /// - a value is too large for f16;
    /// - the file cannot be written.
    pub fn save(
        &self,
        path: impl AsRef<Path>,
        origin: &EmbeddingOrigin,
        precision: EmbeddingPrecision,
    ) -> Result<()> {
        let path = path.as_ref();
        let computed = self.tensor.dtype();
        let tensor = self.tensor.to_device(&Device::Cpu)?.to_dtype(precision.dtype(computed))?;
        if precision != EmbeddingPrecision::Exact
            && is_finite(&self.tensor)?
            && !is_finite(&tensor)?
        {
            return Err(Error::file(path, "the embedding has values too large for its precision"));
        }
        let Frame { original, resized } = self.frame;
        let dtype = computed.as_str().to_string();
        let header = Header { version: VERSION, origin: origin.clone(), original, resized, dtype };
        let header = serde_json::to_string(&header)
            .map_err(|e| Error::file(path, format!("cannot be serialized: {e}")))?;
        SEAL.stage(path, &header, &BTreeMap::from([(TENSOR.to_string(), tensor)]))?.commit()
    }

    /// Reads an embedding, in the dtype it was computed in, and what it was computed from.
    ///
    /// # Errors
    /// - the file cannot be read, is truncated, damaged or no embedding;
    /// - its version is another.
    pub fn load(path: impl AsRef<Path>, device: &Device) -> Result<(Self, EmbeddingOrigin)> {
        let StoredEmbedding { embedding, origin, .. } = load(path.as_ref(), device)?;
        Ok((embedding, origin))
    }
}

/// Whether no value is infinite or NaN.
fn is_finite(tensor: &Tensor) -> candle_core::Result<bool> {
    // 0 times infinity or NaN is NaN, and so is the sum.
    let zeros = (tensor.to_dtype(DType::F32)? * 0.0)?;
    Ok(!zeros.sum_all()?.to_scalar::<f32>()?.is_nan())
}

/// Reads a file.
///
/// # Errors
/// As [`ImageEmbedding::load`].
pub(super) fn load(path: &Path, device: &Device) -> Result<StoredEmbedding> {
    let file = TensorFile::open(path)?;
    let (header, mut tensors) = SEAL.read(&file, device)?;
    // The version first: another one may have other fields.
    let header: Value = serde_json::from_str(&header).map_err(|e| SEAL.invalid(&file, e))?;
    if header["version"] != VERSION {
        let message = format!("version {}, expected {VERSION}", header["version"]);
        return Err(SEAL.invalid(&file, message));
    }
    let header: Header = serde_json::from_value(header).map_err(|e| SEAL.invalid(&file, e))?;
    let tensor = tensors.remove(TENSOR);
    let tensor = tensor.ok_or_else(|| SEAL.invalid(&file, "the tensor `embedding` is missing"))?;
    if tensor.rank() != 4 || tensor.dims()[0] != 1 {
        let message = format!("its shape is {:?}, expected [1, C, h, w]", tensor.dims());
        return Err(SEAL.invalid(&file, message));
    }
    let frame = Frame { original: header.original, resized: header.resized };
    if [frame.original, frame.resized].iter().any(|size| size.0 == 0 || size.1 == 0) {
        return Err(SEAL.invalid(&file, format!("its image is {frame:?}")));
    }
    let dtype = DType::from_str(&header.dtype).map_err(|e| SEAL.invalid(&file, e))?;
    let (stored, tensor) = (tensor.dtype(), tensor.to_dtype(dtype)?);
    Ok(StoredEmbedding {
        embedding: ImageEmbedding { tensor, hq_features: None, frame },
        origin: header.origin,
        stored,
    })
}
