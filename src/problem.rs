//! The shapes of an operation's work, checked and free of tensors: what the CPU path, and any other, computes from.

use crate::philox::Dropout;
use std::hash::{Hash, Hasher};

/// LayerNorm of `rows` rows.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LayerNormProblem {
    /// Rows: all dimensions but the last.
    pub rows: usize,
    /// Length of a row.
    pub size: usize,
    /// Added to the variance.
    pub eps: f64,
}

impl LayerNormProblem {
    /// The operation's name, as errors give it.
    pub const OP: &'static str = "layer-norm";
}

/// Attention over `batch` grids of `h x w` tokens, in windows of `side_h x side_w` (the grid itself if global).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AttentionProblem {
    /// Images.
    pub batch: usize,
    /// Rows of the grid.
    pub h: usize,
    /// Columns of the grid.
    pub w: usize,
    /// Heads.
    pub num_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Rows of a window.
    pub side_h: usize,
    /// Columns of a window.
    pub side_w: usize,
    /// Factor of `q . k`.
    pub softmax_scale: f32,
    /// Whether there are relative positions: tables of `2 side - 1` rows.
    pub rel_pos: bool,
    /// Dropout on the attention weights.
    pub dropout: Option<Dropout>,
}

impl AttentionProblem {
    /// The operation's name, as errors give it.
    pub const OP: &'static str = "rel-pos-attention";

    /// Windows in a column of windows.
    pub fn window_rows(&self) -> usize {
        self.h.div_ceil(self.side_h)
    }

    /// Windows in a row of windows.
    pub fn window_cols(&self) -> usize {
        self.w.div_ceil(self.side_w)
    }

    /// Windows of the whole batch; with global attention, one per image.
    pub fn windows(&self) -> usize {
        self.batch * self.window_rows() * self.window_cols()
    }

    /// Tokens of a window, padding included.
    pub fn tokens(&self) -> usize {
        self.side_h * self.side_w
    }

    /// Channels: all heads together.
    pub fn channels(&self) -> usize {
        self.num_heads * self.head_dim
    }

    /// Rows of the two tables together.
    pub fn table_rows(&self) -> (usize, usize) {
        if self.rel_pos {
            (2 * self.side_h - 1, 2 * self.side_w - 1)
        } else {
            (0, 0)
        }
    }

    /// Where token `token` of window `window` lies in the flattened `[batch, h, w]`; none if it is padding.
    pub fn grid_index(&self, window: usize, token: usize) -> Option<usize> {
        let (rows, cols) = (self.window_rows(), self.window_cols());
        let (image, row, col) = (window / (rows * cols), window / cols % rows, window % cols);
        let y = row * self.side_h + token / self.side_w;
        let x = col * self.side_w + token % self.side_w;
        (y < self.h && x < self.w).then_some((image * self.h + y) * self.w + x)
    }
}

/// Attention of `queries` tokens to `keys` tokens, heads last.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct MultiHeadProblem {
    /// Entries of the output.
    pub batch: usize,
    /// Entries of q: `batch`, or 1 for all.
    pub q_batch: usize,
    /// Entries of k and v: `batch`, or 1 for all.
    pub kv_batch: usize,
    /// Tokens that attend.
    pub queries: usize,
    /// Tokens that are attended to.
    pub keys: usize,
    /// Number of heads.
    pub num_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Factor of `q . k`.
    pub softmax_scale: f32,
}

impl MultiHeadProblem {
    /// The operation's name, as errors give it.
    pub const OP: &'static str = "multi-head-attention";

    /// Channels: all heads together.
    pub fn channels(&self) -> usize {
        self.num_heads * self.head_dim
    }
}

/// The low-rank part of one projection.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LoraProblem {
    /// Rows of A.
    pub rank: usize,
    /// Factor of the low-rank part.
    pub scaling: f32,
    /// Dropout on the input of A.
    pub dropout: Option<Dropout>,
    /// Whether there is a LoRA bias.
    pub bias: bool,
}

/// An elementwise function without parameters.
///
/// [Example](crate::ops)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// `x`
    #[default]
    Identity,
    /// The exact GELU, `x/2 (1 + erf(x / sqrt 2))`.
    Gelu,
    /// `max(x, 0)`
    Relu,
    /// `x/2 (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3)))`
    GeluTanh,
    /// The exact GELU, between -10 and 10.
    GeluClipped,
    /// `x sigmoid(1.702 x)`
    QuickGelu,
    /// `x sigmoid(x)`
    Silu,
    /// `x tanh(ln(1 + e^x))`
    Mish,
    /// `x min(max(x + 3, 0), 6) / 6`
    Hardswish,
    /// `x`, or `x / 100` below 0.
    LeakyRelu,
    /// `max(x, 0)^2`
    ReluSquared,
    /// `min(max(x, 0), 6)`
    Relu6,
    /// `1 / (1 + e^-x)`
    Sigmoid,
    /// `tanh(x)`
    Tanh,
    /// `(1 + erf((x - mu) / (sigma sqrt 2))) / 2`, with `mu = 0.707107` and `sigma = 0.282095`.
    Laplace,
}

impl Activation {
    /// Whether the kernels and the CPU path apply it to a projection's sum; the others follow the projection.
    pub fn is_fused(self) -> bool {
        matches!(self, Self::Identity | Self::Gelu | Self::Relu)
    }
}

/// One of the projections that share an input.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ProjectionProblem {
    /// Width of the output.
    pub out_dim: usize,
    /// Whether there is a bias.
    pub bias: bool,
    /// The low-rank part.
    pub lora: Option<LoraProblem>,
}

impl ProjectionProblem {
    /// The name of the operation of one projection, as errors give it.
    pub const LINEAR: &'static str = "lora-linear";
    /// The name of the operation of three.
    pub const QKV: &'static str = "lora-qkv";

    /// The name of the operation that computes `count` projections of one input.
    pub fn op(count: usize) -> &'static str {
        match count {
            1 => Self::LINEAR,
            _ => Self::QKV,
        }
    }
}

/// Problems are keys of caches: their factors are finite, and no part of the hash.
macro_rules! key {
    ($($problem:ident { $($size:ident),+ })+) => {$(
        impl Eq for $problem {}
        impl Hash for $problem {
            fn hash<H: Hasher>(&self, state: &mut H) {
                ($(self.$size,)+).hash(state);
            }
        }
    )+};
}
key! {
    LayerNormProblem { rows, size }
    AttentionProblem { batch, h, w, num_heads, head_dim, side_h, side_w, rel_pos }
    MultiHeadProblem { batch, q_batch, kv_batch, queries, keys, num_heads, head_dim }
    LoraProblem { rank, bias }
}

/// The neighbourhoods that a convolution multiplies, padded by half the kernel: `[batch, h, w, channels]` ->
/// `[batch, rows, cols, kernel kernel channels]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ConvColumns {
    /// Images.
    pub batch: usize,
    /// Rows of positions.
    pub h: usize,
    /// Columns of positions.
    pub w: usize,
    /// Channels of a position.
    pub channels: usize,
    /// Side of a neighbourhood.
    pub kernel: usize,
    /// Distance of neighbourhoods along an axis.
    pub stride: usize,
}

impl ConvColumns {
    /// The operation's name, as errors give it.
    pub const OP: &'static str = "conv-columns";

    /// Rows of neighbourhoods.
    pub fn rows(&self) -> usize {
        self.h.div_ceil(self.stride)
    }

    /// Columns of neighbourhoods.
    pub fn cols(&self) -> usize {
        self.w.div_ceil(self.stride)
    }

    /// Length of a neighbourhood.
    pub fn width(&self) -> usize {
        self.kernel * self.kernel * self.channels
    }
}

/// A step of AdamW, without its parameters:
///
/// ```text
/// m <- m + (g - m) beta1_rest        v <- v beta2 + g^2 beta2_rest
/// p <- p decay - rate m / (sqrt(v) root_correction + eps)
/// ```
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWStep {
    /// `1 - beta1`
    pub beta1_rest: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// `1 - beta2`
    pub beta2_rest: f64,
    /// `1 / sqrt(1 - beta2^t)`
    pub root_correction: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Largest norm of all gradients together; longer ones are shortened to it.
    pub max_norm: Option<f64>,
}

/// The numbers of a step of AdamW that a parameter may have for itself.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamWRates {
    /// `1 - lr weight_decay`
    pub decay: f64,
    /// `lr / (1 - beta1^t)`
    pub rate: f64,
}

/// Share of the object's pixels in the focal loss.
pub const FOCAL_ALPHA: f32 = 0.25;

/// Weights of a mask's losses.
#[derive(Clone, Copy, Debug)]
pub struct MaskTerms {
    /// Cross-entropy.
    pub bce: f64,
    /// Focal loss.
    pub focal: f64,
    /// Dice loss.
    pub dice: f64,
}

/// Where the small tensors of one projection lie in the flat vector that holds those of all.
///
/// `[bias? | A | B | lora_bias?]` for each projection in turn: one differentiable input instead of a dozen.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SmallLayout {
    /// `[out]`
    pub bias: Option<std::ops::Range<usize>>,
    /// `[rank, in]`
    pub a: std::ops::Range<usize>,
    /// `[out, rank]`
    pub b: std::ops::Range<usize>,
    /// `[out]`
    pub lora_bias: Option<std::ops::Range<usize>>,
}

impl SmallLayout {
    /// Those that are there, in their order.
    pub fn ranges(&self) -> impl Iterator<Item = &std::ops::Range<usize>> {
        let all = [self.bias.as_ref(), Some(&self.a), Some(&self.b), self.lora_bias.as_ref()];
        all.into_iter().flatten().filter(|range| !range.is_empty())
    }
}

/// The layout of every projection's small tensors, and their total length.
pub fn small_layout(in_dim: usize, projections: &[ProjectionProblem]) -> (Vec<SmallLayout>, usize) {
    small_layout_of(in_dim, projections, || true)
}

/// The layout of those small tensors for which `is_in` says so, asked for each in its order. The others' ranges are
/// empty.
pub fn small_layout_of(
    in_dim: usize,
    projections: &[ProjectionProblem],
    mut is_in: impl FnMut() -> bool,
) -> (Vec<SmallLayout>, usize) {
    let mut end = 0;
    let mut take = |length: usize| {
        let start = end;
        if length > 0 && is_in() {
            end += length;
        }
        start..end
    };
    let layouts = projections
        .iter()
        .map(|p| SmallLayout {
            bias: p.bias.then(|| take(p.out_dim)),
            a: take(p.lora.map_or(0, |lora| lora.rank * in_dim)),
            b: take(p.lora.map_or(0, |lora| lora.rank * p.out_dim)),
            lora_bias: p.lora.filter(|lora| lora.bias).map(|_| take(p.out_dim)),
        })
        .collect();
    (layouts, end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_grid_token_lies_in_exactly_one_window() {
        for (h, w, side) in [(10, 13, 7), (6, 6, 14), (14, 28, 14), (1, 5, 2)] {
            let problem = AttentionProblem {
                batch: 2,
                h,
                w,
                num_heads: 1,
                head_dim: 1,
                side_h: side,
                side_w: side,
                softmax_scale: 1.0,
                rel_pos: true,
                dropout: None,
            };
            let mut seen = vec![0; 2 * h * w];
            for window in 0..problem.windows() {
                for token in 0..problem.tokens() {
                    if let Some(index) = problem.grid_index(window, token) {
                        seen[index] += 1;
                    }
                }
            }
            assert!(seen.iter().all(|&count| count == 1), "{h}x{w} in windows of {side}");
        }
    }
}
