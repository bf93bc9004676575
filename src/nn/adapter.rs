//! One LoRA or DoRA adapter of a layer: its tensors and its scaling.
//!
//! ```text
//! linear        A [rank, in]         B [out, rank]
//! convolution   A [rank, in, k, k]   B [out, rank, 1, 1]     a convolution to rank channels, then a 1x1
//! delta         scaling B A, as B [out, rank] times A [rank, rest]
//! ```
//!
//! Source: `peft/tuners/lora/layer.py`. `low_rank.rs` holds the computation.

use candle_core::{DType, Result, Tensor};

/// The low-rank part of an adapted [`Linear`](super::Linear) or [`Conv2d`](super::Conv2d).
///
/// [Example](crate::nn::Adapters)
#[derive(Clone, Debug)]
pub struct Adapter {
    /// `[rank, in]`; of a convolution `[rank, in, k, k]`.
    pub a: Tensor,
    /// `[out, rank]`; of a convolution `[out, rank, 1, 1]`.
    pub b: Tensor,
    /// `[out]`, PEFT's `lora_B.bias`; scaled as the rest.
    pub b_bias: Option<Tensor>,
    /// `[out]`, DoRA's `lora_magnitude_vector`; of a convolution `[1, out, 1, 1]`.
    pub magnitude: Option<Tensor>,
    /// `alpha / rank`, or `alpha / sqrt(rank)` with rank stabilisation.
    pub scaling: f64,
    /// Dropout probability of the adapter's input.
    pub dropout: f64,
    /// Stream of the dropout mask, from the names of layer and adapter.
    pub stream: u32,
    /// Whether base tensors are changed along (by `bias`, `modules_to_save`, an initialisation): such an adapter is
    /// alone on its model.
    pub changes_base: bool,
}

impl Adapter {
    /// Number of rows of `a`.
    pub fn rank(&self) -> usize {
        self.a.dims()[0]
    }

    /// `scaling * B A` in the shape of the layer's weight, in f32.
    pub fn delta(&self) -> Result<Tensor> {
        let (rank, out_dim) = (self.rank(), self.b.dims()[0]);
        let a = self.a.to_dtype(DType::F32)?.reshape((rank, ()))?;
        let b = self.b.to_dtype(DType::F32)?.reshape((out_dim, rank))?;
        let mut dims = self.a.dims().to_vec();
        dims[0] = out_dim;
        (b.matmul(&a)? * self.scaling)?.reshape(dims)
    }

    /// The tensors under the names they have in PEFT's files.
    pub fn tensors(&self) -> impl Iterator<Item = (&'static str, &Tensor)> {
        let present = [("lora_A.weight", &self.a), ("lora_B.weight", &self.b)];
        let optional = [
            ("lora_B.bias", self.b_bias.as_ref()),
            ("lora_magnitude_vector", self.magnitude.as_ref()),
        ];
        let optional = optional.into_iter().filter_map(|(name, tensor)| Some((name, tensor?)));
        present.into_iter().chain(optional)
    }

    /// As [`tensors`](Self::tensors), with leave to change them.
    pub fn tensors_mut(&mut self) -> impl Iterator<Item = (&'static str, &mut Tensor)> {
        let present = [("lora_A.weight", &mut self.a), ("lora_B.weight", &mut self.b)];
        let optional = [
            ("lora_B.bias", self.b_bias.as_mut()),
            ("lora_magnitude_vector", self.magnitude.as_mut()),
        ];
        let optional = optional.into_iter().filter_map(|(name, tensor)| Some((name, tensor?)));
        present.into_iter().chain(optional)
    }
}
