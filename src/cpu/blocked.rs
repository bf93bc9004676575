//! Products of a tall matrix with a packed one, block by block.
//!
//! ```text
//! acc [rows, PANEL] = sum over terms of  scale * left [rows, k] right [k, PANEL]
//! ```
//! The right side is packed once per operation into panels of `PANEL` columns. A block of rows then meets one panel
//! after the other. Its accumulator stays in cache until the caller is done with it. So bias, low-rank term, activation
//! and residual never cost another pass over the output.

use super::bf16;
use super::buffer::Buffer;
use super::element::Element;
use super::int8::{self, dequantized};
use super::panel::{panel, Into, Left, Right, PANEL};
use super::simd::{padded, run, MAX_LANES};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Rows of one block.
pub const ROWS: usize = 192;
/// Depth of one product: a panel of this depth stays in the second-level cache.
const DEPTH: usize = 768;

/// A matrix `[k, n]` in panels `[panel][k, PANEL]`, the last one filled up with zeros.
pub struct Packed {
    k: usize,
    n: usize,
    data: Buffer,
    kind: Kind,
}

/// The kind of a packed matrix's elements; k counts elements.
enum Kind {
    /// A number.
    Number,
    /// A pair in bf16, see [`super::bf16`].
    Pair,
    /// Four bytes, see [`super::int8`], with the scale of each column, padded as the panels are.
    Quad(Vec<f32>),
}

impl Packed {
    /// From the transpose, `rows [n, k]`, as numbers.
    pub fn from_transposed<T: Element>(rows: &[T], n: usize, k: usize) -> Self {
        Self::pack(n, k, |first, panel| {
            // Sixteen lines at a time stay in the first-level cache while all their columns are filled.
            for (group, lines) in panel.chunks_mut(16 * PANEL).enumerate() {
                let depth = lines.len() / PANEL;
                for (column, row) in rows.chunks_exact(k).skip(first).take(PANEL).enumerate() {
                    let values = &row[group * 16..][..depth];
                    for (line, &value) in lines.chunks_exact_mut(PANEL).zip(values) {
                        line[column] = value.widened();
                    }
                }
            }
        })
    }

    /// From the matrix itself, `rows [k, n]`, as numbers.
    pub fn from_rows<T: Element>(rows: &[T], k: usize, n: usize) -> Self {
        Self::pack(n, k, |first, panel| {
            let width = PANEL.min(n - first);
            for (line, row) in panel.chunks_exact_mut(PANEL).zip(rows.chunks_exact(n)) {
                line.iter_mut()
                    .zip(&row[first..first + width])
                    .for_each(|(out, x)| *out = x.widened());
            }
        })
    }

    /// As [`from_transposed`](Self::from_transposed), of pairs: `rows [n, k / 2]`.
    pub fn from_transposed_pairs(rows: &[f32], n: usize, k: usize) -> Self {
        Self { kind: Kind::Pair, ..Self::from_transposed(rows, n, k / 2) }
    }

    /// As [`from_rows`](Self::from_rows), of `rows [k, n / 2]` in pairs along n, which become pairs along k. Both are
    /// even.
    pub fn from_rows_of_pairs(rows: &[f32], k: usize, n: usize) -> Self {
        let packed = Self::pack(n, k / 2, |first, panel| {
            let some = first / 2..n.min(first + PANEL) / 2;
            for (line, rows) in panel.chunks_exact_mut(PANEL).zip(rows.chunks_exact(n)) {
                let (upper, lower) = rows.split_at(n / 2);
                let pairs = upper[some.clone()].iter().zip(&lower[some.clone()]);
                for (out, (&upper, &lower)) in line.chunks_exact_mut(2).zip(pairs) {
                    out.copy_from_slice(&bf16::transpose(upper, lower));
                }
            }
        });
        Self { kind: Kind::Pair, ..packed }
    }

    /// As [`from_transposed`](Self::from_transposed), of quads: `rows [n, k / 4]` and a scale for each.
    pub fn from_transposed_quads(rows: &[f32], scales: &[f32], n: usize, k: usize) -> Self {
        let mut scales = scales.to_vec();
        scales.resize(n.next_multiple_of(PANEL), 0.0);
        Self { kind: Kind::Quad(scales), ..Self::from_transposed(rows, n, k / 4) }
    }

    /// As [`from_rows`](Self::from_rows), of `rows [k, n / 4]` of quads along n with a scale for each, as numbers.
    pub fn from_rows_of_quads(rows: &[f32], scales: &[f32], k: usize, n: usize) -> Self {
        Self::pack(n, k, |first, panel| {
            let width = PANEL.min(n - first);
            let rows = bytemuck::cast_slice::<f32, u8>(rows).chunks_exact(n).zip(scales);
            for (line, (row, &scale)) in panel.chunks_exact_mut(PANEL).zip(rows) {
                for (out, &byte) in line.iter_mut().zip(&row[first..first + width]) {
                    *out = dequantized(byte, scale);
                }
            }
        })
    }

    /// As [`from_rows_of_quads`](Self::from_rows_of_quads), rounded to bf16 in pairs along k, which is even.
    pub fn from_rows_of_quads_as_pairs(rows: &[f32], scales: &[f32], k: usize, n: usize) -> Self {
        let packed = Self::pack(n, k / 2, |first, panel| {
            let width = PANEL.min(n - first);
            let rows = bytemuck::cast_slice::<f32, u8>(rows).chunks_exact(2 * n);
            let mut both = [[0f32; PANEL]; 2];
            for (line, (rows, scales)) in
                panel.chunks_exact_mut(PANEL).zip(rows.zip(scales.chunks_exact(2)))
            {
                for ((out, row), &scale) in both.iter_mut().zip(rows.chunks_exact(n)).zip(scales) {
                    for (out, &byte) in out.iter_mut().zip(&row[first..first + width]) {
                        *out = dequantized(byte, scale);
                    }
                }
                bf16::pairs_of_rows(&both[0], &both[1], line);
            }
        });
        Self { kind: Kind::Pair, ..packed }
    }

    /// A matrix without elements.
    pub fn empty() -> Self {
        Self { k: 0, n: 0, data: Buffer::default(), kind: Kind::Number }
    }

    /// Whether its elements are pairs; those of the left side must be, too.
    pub fn in_pairs(&self) -> bool {
        matches!(self.kind, Kind::Pair)
    }

    /// Whether its elements are quads; the left side is then rows of [`int8::rows`].
    pub fn in_quads(&self) -> bool {
        matches!(self.kind, Kind::Quad(_))
    }

    fn pack(n: usize, k: usize, fill: impl Fn(usize, &mut [f32]) + Sync) -> Self {
        let mut data = Buffer::any(n.div_ceil(PANEL) * k * PANEL);
        data.par_chunks_mut(k * PANEL).enumerate().for_each(|(index, panel)| {
            if n < (index + 1) * PANEL {
                panel.fill(0.0);
            }
            fill(index * PANEL, panel);
        });
        Self { k, n, data, kind: Kind::Number }
    }

    /// First columns of the panels.
    pub fn panels(&self) -> impl Iterator<Item = usize> {
        (0..self.n).step_by(PANEL)
    }
}

/// One product of a sum.
#[derive(Clone, Copy)]
pub struct Term<'a> {
    /// Rows `stride` apart; the first `k` elements of each count. Pairs if the right side's are.
    pub left: &'a [f32],
    /// Distance of the left side's rows.
    pub stride: usize,
    /// `[k, n]`
    pub right: &'a Packed,
    /// Factor.
    pub scale: f32,
}

/// `acc [rows, PANEL] =` the sum of the terms, for those of the columns `column..column + PANEL` that there are.
pub fn accumulate(acc: &mut [f32], rows: usize, column: usize, terms: &[Term<'_>]) {
    let mut into = Into::Store;
    for term in terms {
        let (k, width) = (term.right.k, padded(term.right.n - column).min(PANEL));
        let panel_data = &term.right.data[column / PANEL * k * PANEL..][..k * PANEL];
        if let Kind::Quad(scales) = &term.right.kind {
            let (a, b, scales) = (term.left, panel_data, &scales[column..]);
            let (how, shape) = ((into, term.scale), (rows, width, k));
            let operands = int8::Operands { into: how, shape, a, b, b_stride: PANEL, scales };
            int8::product((&mut *acc, PANEL), &operands);
            into = Into::Add;
            continue;
        }
        for (depth, right) in panel_data.chunks(DEPTH * PANEL).enumerate() {
            let left = &term.left[depth * DEPTH..];
            let multiply = if term.right.in_pairs() { bf16::product } else { panel };
            let (left, right, shape) = (
                Left::Rows(left, term.stride),
                Right(right, PANEL),
                (rows, width, right.len() / PANEL),
            );
            multiply((&mut *acc, PANEL), (into, term.scale), shape, left, right);
            into = Into::Add;
        }
    }
}

/// Adds a term to `out [rows, n]`; `acc` is scratch.
pub fn add_term(out: &mut [f32], rows: usize, term: &Term<'_>, acc: &mut Vec<f32>) {
    let Packed { k, n, ref kind, ref data } = *term.right;
    for column in term.right.panels() {
        if !matches!(kind, Kind::Quad(_)) && n.is_multiple_of(MAX_LANES) {
            let data = &data[column / PANEL * k * PANEL..][..k * PANEL];
            let (left, into) = (Left::Rows(term.left, term.stride), (Into::Add, term.scale));
            let shape = (rows, PANEL.min(n - column), k);
            let multiply = if matches!(kind, Kind::Pair) { bf16::product } else { panel };
            multiply((&mut out[column..], n), into, shape, left, Right(data, PANEL));
        } else {
            acc.resize(rows * PANEL, 0.0);
            accumulate(acc, rows, column, &[*term]);
            run(AddColumns { out, width: n, column, acc });
        }
    }
}

/// `out [rows, width] += acc [rows, PANEL]` in the columns from `column` on.
struct AddColumns<'a> {
    out: &'a mut [f32],
    width: usize,
    column: usize,
    acc: &'a [f32],
}

impl WithSimd for AddColumns<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let end = self.width.min(self.column + PANEL);
        let rows = self.out.chunks_exact_mut(self.width).zip(self.acc.chunks_exact(PANEL));
        for (out, acc) in rows {
            for (out, acc) in out[self.column..end].iter_mut().zip(acc) {
                *out += acc;
            }
        }
    }
}

/// `left^T right` for `left [rows, m]` and `right [rows, n]`, added to `sum [m, padded n]`; rows of `left` are
/// `left_stride`, of `right` padded n apart.
pub fn add_transposed_product(
    sum: &mut [f32],
    scale: f32,
    (rows, m, n): (usize, usize, usize),
    (left, left_stride): (&[f32], usize),
    right: &[f32],
) {
    let width = padded(n);
    let left = Left::Columns(left, left_stride);
    panel((sum, width), (Into::Add, scale), (m, width, rows), left, Right(right, width));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pairs_change_their_direction() {
        let (k, n) = (10, 70);
        let value = |i: usize| ((i * 29 % 31) as f32 - 15.0) / 16.0;
        let matrix: Vec<f32> = (0..k * n).map(value).collect();
        let packed = Packed::from_rows_of_pairs(&bf16::pairs(&matrix), k, n);
        for (index, &pair) in packed.data.iter().enumerate() {
            let (panel, line) = (index / (k / 2 * PANEL), index / PANEL % (k / 2));
            let column = panel * PANEL + index % PANEL;
            let expected = |row: usize| if column < n { matrix[row * n + column] } else { 0.0 };
            assert_eq!(bf16::split(pair), [expected(2 * line), expected(2 * line + 1)], "{index}");
        }
    }

    #[test]
    fn deep_and_ragged_sums() {
        let (rows, n, k) = (7, 70, DEPTH + 5);
        let value = |i: usize| ((i * 29 % 31) as f32 - 15.0) / 16.0;
        let left: Vec<f32> = (0..rows * (k + 3)).map(value).collect();
        let right: Vec<f32> = (0..n * k).map(|i| value(i + 7)).collect();
        let transposed: Vec<f32> = (0..k * n).map(|i| right[(i % n) * k + i / n]).collect();
        let by_rows = Packed::from_rows(&transposed, k, n);
        let packed = Packed::from_transposed(&right, n, k);
        assert!(*by_rows.data == *packed.data);
        let term = Term { left: &left, stride: k + 3, right: &packed, scale: 0.5 };
        for column in packed.panels() {
            let mut acc = vec![f32::NAN; rows * PANEL];
            accumulate(&mut acc, rows, column, &[term, term]);
            for i in 0..rows {
                for j in column..n.min(column + PANEL) {
                    let dot: f64 = (0..k)
                        .map(|p| f64::from(left[i * (k + 3) + p]) * f64::from(right[j * k + p]))
                        .sum();
                    let got = f64::from(acc[i * PANEL + j - column]);
                    assert!((got - dot).abs() < 1e-3, "{i} {j}: {got} {dot}");
                }
            }
        }
    }
}
