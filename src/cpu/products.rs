//! The products of attention, in f32 or of pairs in bf16, and their operands.

use super::bf16;
use super::element::Element;
use super::panel::{self, Into, Left, Right};
use std::borrow::Cow;

/// Kinds of the elements of products.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Products {
    /// Numbers.
    F32,
    /// Pairs of neighbours in the sum's direction, see [`super::bf16`].
    Pairs,
}

impl Products {
    /// The fastest for rows of `len` elements of type `T`.
    pub fn of<T: Element>(len: usize) -> Self {
        match T::IS_BF16 && len.is_multiple_of(2) && bf16::available() {
            true => Self::Pairs,
            false => Self::F32,
        }
    }

    /// Elements that hold so many numbers.
    pub fn depth(self, numbers: usize) -> usize {
        match self {
            Self::F32 => numbers,
            Self::Pairs => numbers.div_ceil(2),
        }
    }

    /// `C [m, n] (+)= scale * A [m, k] B [k, n]`, see [`panel::panel`]; k counts numbers.
    pub fn multiply(
        self,
        c: (&mut [f32], usize),
        into: (Into, f32),
        (m, n, k): (usize, usize, usize),
        a: Left<'_>,
        b: Right<'_>,
    ) {
        match self {
            Self::F32 => panel::panel(c, into, (m, n, k), a, b),
            Self::Pairs => bf16::product(c, into, (m, n, self.depth(k)), a, b),
        }
    }

    /// A's rows, or the columns of B^T: neighbours in a row are neighbours in k.
    pub fn along_rows(self, rows: &[f32]) -> Cow<'_, [f32]> {
        match self {
            Self::F32 => Cow::Borrowed(rows),
            Self::Pairs => Cow::Owned(bf16::pairs(rows)),
        }
    }

    /// B's rows, or the columns of A^T: a row and the one below it are neighbours in k. A last row alone meets zeros.
    pub fn down_rows(self, rows: &[f32], width: usize) -> Cow<'_, [f32]> {
        if self == Self::F32 {
            return Cow::Borrowed(rows);
        }
        let zeros = vec![0f32; width];
        let mut pairs = vec![0f32; self.depth(rows.len() / width) * width];
        for (out, rows) in pairs.chunks_exact_mut(width).zip(rows.chunks(2 * width)) {
            let (first, second) = rows.split_at(width);
            bf16::pairs_of_rows(first, if second.is_empty() { &zeros } else { second }, out);
        }
        Cow::Owned(pairs)
    }

    /// The dot products of rows of two A's, with the bits of [`multiply`](Self::multiply).
    pub fn row_dots(self, a: &[f32], b: &[f32], width: usize) -> Vec<f32> {
        match self {
            Self::F32 => panel::row_dots(a, b, width),
            Self::Pairs => bf16::row_dots(a, b, width),
        }
    }
}
