//! The operations as naive loops in f64: what everything else is measured against.
//!
//! Nothing here calls a matrix product, a softmax or any other code of candle's or of this crate's fast paths.
//!
//! ```
//! use candle_sam_lora::testing::reference;
//!
//! // Two rows of three numbers through a weight of one row.
//! let y = reference::linear(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], &[1.0, 0.0, -1.0], 3);
//! assert_eq!(y, [-2.0, -2.0]);
//! ```

/// A row-major f64 array.
///
/// [Example](mod@crate::testing::reference)
pub type Array = Vec<f64>;

/// LayerNorm of each row of `x [rows, size]`.
///
/// [Example](mod@crate::testing::reference)
pub fn layer_norm(x: &[f64], weight: &[f64], bias: &[f64], eps: f64) -> Array {
    let size = weight.len();
    let mut y = Vec::with_capacity(x.len());
    for row in x.chunks(size) {
        let mean = row.iter().sum::<f64>() / size as f64;
        let var = row.iter().map(|x| (x - mean) * (x - mean)).sum::<f64>() / size as f64;
        for i in 0..size {
            y.push((row[i] - mean) / (var + eps).sqrt() * weight[i] + bias[i]);
        }
    }
    y
}

/// `x [rows, in] -> [rows, out]` through `weight [out, in]`.
///
/// [Example](mod@crate::testing::reference)
pub fn linear(x: &[f64], weight: &[f64], in_dim: usize) -> Array {
    let mut y = Vec::new();
    for row in x.chunks(in_dim) {
        for w in weight.chunks(in_dim) {
            y.push(row.iter().zip(w).map(|(x, w)| x * w).sum());
        }
    }
    y
}

/// The low-rank part of [`lora_linear`]; `mask` is dropout's mask times its scale, shaped as x.
///
/// [Example](mod@crate::testing::reference)
#[derive(Clone, Debug)]
pub struct Lora {
    /// `[rank, in]`
    pub a: Array,
    /// `[out, rank]`
    pub b: Array,
    /// `[out]`
    pub b_bias: Option<Array>,
    /// Factor of the low-rank part.
    pub scaling: f64,
    /// `[rows, in]`
    pub mask: Option<Array>,
}

/// `x W^T + b + scaling * ((x mask) A^T B^T + lora_bias)`, before activation and residual.
///
/// [Example](mod@crate::testing::reference)
pub fn lora_linear(
    x: &[f64],
    weight: &[f64],
    bias: Option<&[f64]>,
    lora: Option<&Lora>,
    in_dim: usize,
) -> Array {
    let mut y = linear(x, weight, in_dim);
    let out_dim = weight.len() / in_dim;
    if let Some(bias) = bias {
        for row in y.chunks_mut(out_dim) {
            row.iter_mut().zip(bias).for_each(|(y, b)| *y += b);
        }
    }
    if let Some(lora) = lora {
        let dropped: Array = match &lora.mask {
            Some(mask) => x.iter().zip(mask).map(|(x, m)| x * m).collect(),
            None => x.to_vec(),
        };
        let rank = lora.a.len() / in_dim;
        let low_rank = linear(&linear(&dropped, &lora.a, in_dim), &lora.b, rank);
        for (index, (y, u)) in y.iter_mut().zip(low_rank).enumerate() {
            let bias = lora.b_bias.as_ref().map_or(0.0, |bias| bias[index % out_dim]);
            *y += lora.scaling * (u + bias);
        }
    }
    y
}

/// The exact GELU; the error function by its series, continued fraction in the tail.
///
/// [Example](mod@crate::testing::reference)
pub fn gelu(x: f64) -> f64 {
    0.5 * x * erfc(-x / std::f64::consts::SQRT_2)
}

fn erfc(x: f64) -> f64 {
    if x < 0.0 {
        return 2.0 - erfc(-x);
    }
    let inv_sqrt_pi = 1.0 / std::f64::consts::PI.sqrt();
    if x < 2.5 {
        // erf(x) = 2 / sqrt(pi) sum_n (-1)^n x^(2n+1) / (n! (2n+1))
        let (mut power, mut sum) = (x, x);
        for n in 1..80 {
            power *= -x * x / f64::from(n);
            sum += power / f64::from(2 * n + 1);
        }
        1.0 - 2.0 * inv_sqrt_pi * sum
    } else {
        // erfc(x) = exp(-x^2) / sqrt(pi) / (x + (1/2) / (x + 1 / (x + (3/2) / (x + ..))))
        let fraction = (1..120).rev().fold(x, |f, n| x + 0.5 * f64::from(n) / f);
        (-x * x).exp() * inv_sqrt_pi / fraction
    }
}

/// The attention of SAM's image encoder, by its shapes.
///
/// [Example](mod@crate::testing::reference)
#[derive(Clone, Copy, Debug)]
pub struct Attention {
    /// Images.
    pub batch: usize,
    /// Grid.
    pub grid: (usize, usize),
    /// Heads.
    pub num_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Side of the windows; none is global.
    pub window: Option<usize>,
    /// Factor of `q . k`.
    pub softmax_scale: f64,
}

impl Attention {
    /// `qkv [B, H, W, 3, heads, d] -> [B, H, W, heads, d]`. Tables are `[2 side - 1, d]`; `pad [3, heads, d]` is
    /// the qkv of tokens outside the grid. `mask(window, head, query, key)` is dropout's mask times its scale.
    pub fn forward(
        &self,
        qkv: &[f64],
        tables: Option<(&[f64], &[f64])>,
        pad: &[f64],
        mask: &dyn Fn(usize, usize, usize, usize) -> f64,
    ) -> Array {
        let (h, w) = self.grid;
        let (side_h, side_w) = self.window.map_or((h, w), |side| (side, side));
        let (rows, cols) = (h.div_ceil(side_h), w.div_ceil(side_w));
        let (heads, d) = (self.num_heads, self.head_dim);
        let mut out = vec![0.0; self.batch * h * w * heads * d];
        for image in 0..self.batch {
            for window in 0..rows * cols {
                // The place on the grid of token (y, x) of this window.
                let place = |y: usize, x: usize| {
                    let (y, x) = (window / cols * side_h + y, window % cols * side_w + x);
                    (y < h && x < w).then_some((image * h + y) * w + x)
                };
                let vector = |part: usize, head: usize, y: usize, x: usize| -> &[f64] {
                    let source = place(y, x).map_or(pad, |at| &qkv[at * 3 * heads * d..]);
                    &source[(part * heads + head) * d..][..d]
                };
                for head in 0..heads {
                    for query in 0..side_h * side_w {
                        let (qy, qx) = (query / side_w, query % side_w);
                        let Some(at) = place(qy, qx) else { continue };
                        let q = vector(0, head, qy, qx);
                        let dot = |v: &[f64]| -> f64 { q.iter().zip(v).map(|(a, b)| a * b).sum() };
                        let scores: Array = (0..side_h * side_w)
                            .map(|key| {
                                let (ky, kx) = (key / side_w, key % side_w);
                                let mut score = self.softmax_scale * dot(vector(1, head, ky, kx));
                                if let Some((table_h, table_w)) = tables {
                                    score += dot(&table_h[(qy + side_h - 1 - ky) * d..][..d]);
                                    score += dot(&table_w[(qx + side_w - 1 - kx) * d..][..d]);
                                }
                                score
                            })
                            .collect();
                        let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                        let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                        for (key, score) in scores.iter().enumerate() {
                            let weight = (score - max).exp() / sum
                                * mask(image * rows * cols + window, head, query, key);
                            let v = vector(2, head, key / side_w, key % side_w);
                            for (c, v) in v.iter().enumerate() {
                                out[(at * heads + head) * d + c] += weight * v;
                            }
                        }
                    }
                }
            }
        }
        out
    }
}

/// Attention between two sets of tokens, by its shapes.
///
/// [Example](mod@crate::testing::reference)
#[derive(Clone, Copy, Debug)]
pub struct MultiHead {
    /// Tokens of an entry of q.
    pub queries: usize,
    /// Tokens of an entry of k and v.
    pub keys: usize,
    /// Heads.
    pub num_heads: usize,
    /// Channels of a head.
    pub head_dim: usize,
    /// Factor of `q . k`.
    pub softmax_scale: f64,
}

impl MultiHead {
    /// `q [B, queries, heads, d]`, `k` and `v [B, keys, heads, d]` -> `[B, queries, heads, d]`; an input of one entry
    /// serves the whole batch.
    pub fn forward(&self, q: &[f64], k: &[f64], v: &[f64]) -> Array {
        let (d, channels) = (self.head_dim, self.num_heads * self.head_dim);
        let entry = |x: &[f64], tokens: usize, index: usize| {
            let size = tokens * channels;
            x[index % (x.len() / size) * size..][..size].to_vec()
        };
        let batch = q.len().div_ceil(self.queries * channels);
        let batch = batch.max(k.len().div_ceil(self.keys * channels));
        let mut out = vec![];
        for index in 0..batch {
            let (q, k) = (entry(q, self.queries, index), entry(k, self.keys, index));
            let v = entry(v, self.keys, index);
            for (place, q) in q.chunks(d).enumerate() {
                let head = |x: &[f64], key: usize| -> Array {
                    x[key * channels + place % self.num_heads * d..][..d].to_vec()
                };
                let score = |key: usize| -> f64 {
                    q.iter().zip(head(&k, key)).map(|(q, k)| self.softmax_scale * q * k).sum()
                };
                let scores: Array = (0..self.keys).map(score).collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|s| (s - max).exp()).sum();
                let mut row = vec![0.0; d];
                for (key, score) in scores.iter().enumerate() {
                    let weight = (score - max).exp() / sum;
                    row.iter_mut().zip(head(&v, key)).for_each(|(o, v)| *o += weight * v);
                }
                out.extend(row);
            }
        }
        out
    }
}

/// Linear interpolation of the rows of `table [len, d]` to `len_out` rows, `align_corners=False`.
///
/// [Example](mod@crate::testing::reference)
pub fn resize_linear(table: &[f64], d: usize, len_out: usize) -> Array {
    let len = table.len() / d;
    let mut out = Vec::with_capacity(len_out * d);
    for i in 0..len_out {
        let at = ((i as f64 + 0.5) * len as f64 / len_out as f64 - 0.5).max(0.0);
        let (low, high) = (at as usize, (at as usize + 1).min(len - 1));
        for c in 0..d {
            let weight = at - low as f64;
            out.push(table[low * d + c] * (1.0 - weight) + table[high * d + c] * weight);
        }
    }
    out
}
