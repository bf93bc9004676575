//! Projections that share an input, with LoRA, activation and residual.
//!
//! ```text
//! y_p = x W_p^T + b_p + scaling_p (S_p B_p^T + lora_bias_p),    S_p = drop_p(x) A_p^T     [rows, rank]
//! out = act(cat_p y_p) + residual
//! ```
//! [`forward`] and [`backward`] go through the rows in blocks, and `few_rows` does without; what they share is here.

mod backward;
mod few_rows;
mod forward;

pub use backward::backward;
pub use forward::forward;

use super::activation::Activation;
use super::bf16::available as has_bf16_products;
use super::blocked::Packed;
use super::buffer::Elements;
use super::element::Element;
use super::math::add;
use super::panel::PANEL;
use crate::problem::{small_layout, LoraProblem, ProjectionProblem, SmallLayout};
use half::bf16;
use std::borrow::Cow;
use std::ops::Range;

/// Projections of one input: shapes, weights, parameters.
pub struct Projections<'a> {
    /// Width of the input.
    pub in_dim: usize,
    /// One per projection.
    pub projections: &'a [ProjectionProblem],
    /// One per projection.
    pub weights: Vec<Weight<'a>>,
    /// Biases and adapters, see [`small_layout`].
    pub parameters: &'a [f32],
    /// None is the identity.
    pub activation: Option<Activation>,
}

/// A weight `[out, in]`.
pub enum Weight<'a> {
    /// As it is, or converted.
    F32(Cow<'a, [f32]>),
    /// In bf16, on a machine that multiplies f32 alone.
    Bf16(&'a [bf16]),
    /// In bf16, on a machine that multiplies that: a row's neighbours in pairs, see `cpu/bf16.rs`.
    Pairs(&'a [f32]),
    /// In int8, see [`super::int8`]: a row's neighbours in fours, and the scales of the rows.
    Quads(Cow<'a, [f32]>, Cow<'a, [f32]>),
}

impl<'a> Weight<'a> {
    /// From bf16: in pairs where the machine has the products and both widths are even, since the backward pairs the
    /// other one.
    pub fn from_bf16(values: &'a [bf16], in_dim: usize) -> Self {
        let even = in_dim.is_multiple_of(2) && (values.len() / in_dim).is_multiple_of(2);
        match bytemuck::try_cast_slice(values) {
            Ok(pairs) if even && has_bf16_products() => Self::Pairs(pairs),
            _ => Self::Bf16(values),
        }
    }

    /// From bytes that are 128 too large; the width of the input is a multiple of 4.
    pub fn from_int8(bytes: &'a [u8], scales: Cow<'a, [f32]>) -> Self {
        // Tensors may begin anywhere.
        let quads = match bytemuck::try_cast_slice(bytes) {
            Ok(quads) => Cow::Borrowed(quads),
            Err(_) => Cow::Owned(bytemuck::pod_collect_to_vec(bytes)),
        };
        Self::Quads(quads, scales)
    }

    /// Packed for products with x.
    fn transposed(&self, n: usize, k: usize) -> Packed {
        match self {
            Self::F32(weight) => Packed::from_transposed(weight, n, k),
            Self::Bf16(weight) => Packed::from_transposed(weight, n, k),
            Self::Pairs(pairs) => Packed::from_transposed_pairs(pairs, n, k),
            Self::Quads(quads, scales) => Packed::from_transposed_quads(quads, scales, n, k),
        }
    }

    /// Packed for products with a gradient of type `T`. An int8 weight has the values of its integers times their
    /// scales.
    fn by_rows<T: Element>(&self, k: usize, n: usize) -> Packed {
        match self {
            Self::F32(weight) => Packed::from_rows(weight, k, n),
            Self::Bf16(weight) => Packed::from_rows(weight, k, n),
            Self::Pairs(pairs) => Packed::from_rows_of_pairs(pairs, k, n),
            Self::Quads(quads, scales) => {
                match T::IS_BF16 && k.is_multiple_of(2) && has_bf16_products() {
                    true => Packed::from_rows_of_quads_as_pairs(quads, scales, k, n),
                    false => Packed::from_rows_of_quads(quads, scales, k, n),
                }
            }
        }
    }
}

/// Values of the forward that the backward needs besides its inputs.
#[derive(Debug, Default)]
pub struct Saved<T: Element> {
    /// S of each projection, `[rows, padded rank]`; empty without LoRA.
    s: Vec<Vec<f32>>,
    /// The sum before the activation; empty where it is not needed.
    sum: Elements<T>,
}

/// One projection, ready for its products.
struct Ready<'a> {
    layout: SmallLayout,
    lora: Option<LoraProblem>,
    /// Its columns of the packed output.
    columns: Range<usize>,
    parameters: &'a [f32],
    /// The weight as the product at hand wants it.
    weight: Packed,
}

impl Ready<'_> {
    fn a(&self) -> &[f32] {
        &self.parameters[self.layout.a.clone()]
    }

    fn b(&self) -> &[f32] {
        &self.parameters[self.layout.b.clone()]
    }

    fn out_dim(&self) -> usize {
        self.columns.len()
    }

    /// `bias + scaling * lora_bias`, `[out]`
    fn constant(&self) -> Vec<f32> {
        let mut constant = vec![0f32; self.out_dim()];
        if let Some(bias) = &self.layout.bias {
            add(&mut constant, &self.parameters[bias.clone()]);
        }
        if let (Some(lora), Some(bias)) = (self.lora, &self.layout.lora_bias) {
            for (constant, bias) in constant.iter_mut().zip(&self.parameters[bias.clone()]) {
                *constant += lora.scaling * bias;
            }
        }
        constant
    }
}

impl<'a> Projections<'a> {
    fn total(&self) -> usize {
        self.projections.iter().map(|p| p.out_dim).sum()
    }

    fn ready(&self, pack: impl Fn(&Weight<'_>, usize, usize) -> Packed) -> Vec<Ready<'a>> {
        let (layouts, _) = small_layout(self.in_dim, self.projections);
        let mut end = 0;
        let parts = self.projections.iter().zip(layouts).zip(&self.weights);
        parts
            .map(|((p, layout), weight)| {
                let columns = end..end + p.out_dim;
                end = columns.end;
                let weight = pack(weight, p.out_dim, self.in_dim);
                Ready { layout, lora: p.lora, columns, parameters: self.parameters, weight }
            })
            .collect()
    }
}

/// Moves an accumulator into the columns from `column` on of rows `width` long.
fn copy_columns<T: Element>(acc: &[f32], rows: &mut [T], width: usize, column: usize) {
    let end = width.min(column + PANEL);
    let mut scratch = Vec::new();
    for (row, acc) in rows.chunks_exact_mut(width).zip(acc.chunks_exact(PANEL)) {
        let acc = &acc[..end - column];
        T::write(&mut row[column..end], &mut scratch, |row| row.copy_from_slice(acc));
    }
}

/// Rows of x after dropout, `stride` apart (zero between); x itself where that is the same.
fn dropped(
    x: &[f32],
    in_dim: usize,
    stride: usize,
    first: usize,
    lora: LoraProblem,
) -> Cow<'_, [f32]> {
    if lora.dropout.is_none() && stride == in_dim {
        return Cow::Borrowed(x);
    }
    let mut rows = vec![0f32; x.len() / in_dim * stride];
    for (index, (row, x)) in rows.chunks_exact_mut(stride).zip(x.chunks_exact(in_dim)).enumerate() {
        row[..in_dim].copy_from_slice(x);
        if let Some(dropout) = lora.dropout {
            dropout.apply_row((first + index) as u64, 0, &mut row[..in_dim]);
        }
    }
    Cow::Owned(rows)
}
