//! Run lengths as pieces of columns: the geometry of masks without their pixels.

use super::{ends, Rle, RunWriter, Size};

/// A piece of a column of the object: column, first row, row after the last.
pub(in crate::sam) type Piece = (u32, u32, u32);

impl Rle {
    /// The object's pieces, column by column from above.
    pub(in crate::sam) fn pieces(&self) -> impl Iterator<Item = Piece> + '_ {
        let height = u64::from(self.size.0);
        // Runs may be of anyone's making, and longer than the mask.
        let pixels = height * u64::from(self.size.1);
        let mut start = 0;
        ends(&self.counts).flat_map(move |(end, inside)| {
            let end = end.min(pixels);
            let first = std::mem::replace(&mut start, end);
            let columns = match inside && first < end && height > 0 {
                true => first / height..end.div_ceil(height),
                false => 0..0,
            };
            columns.map(move |x| {
                let top = x * height;
                let (y0, y1) = (first.max(top) - top, end.min(top + height) - top);
                (x as u32, y0 as u32, y1 as u32)
            })
        })
    }

    /// The mask of pieces in ascending order.
    pub(in crate::sam) fn from_pieces(pieces: impl Iterator<Item = Piece>, size: Size) -> Self {
        let height = u64::from(size.0);
        let mut runs = RunWriter { counts: vec![0], value: false };
        let mut place = 0;
        for (x, y0, y1) in pieces {
            let start = u64::from(x) * height + u64::from(y0);
            runs.push(false, (start - place) as u32);
            runs.push(true, y1 - y0);
            place = start + u64::from(y1 - y0);
        }
        runs.push(false, (height * u64::from(size.1) - place) as u32);
        Self { size, counts: runs.counts }
    }

    /// The mask in an image of `size`, its first pixel at row and column `at`.
    pub(in crate::sam) fn placed(&self, at: Size, size: Size) -> Self {
        let shifted = self.pieces().map(|(x, y0, y1)| (x + at.1, y0 + at.0, y1 + at.0));
        Self::from_pieces(shifted, size)
    }

    /// Pixels that one of two masks of one size has.
    pub(in crate::sam) fn union(&self, other: &Self) -> Self {
        let mut runs = RunWriter { counts: vec![0], value: false };
        let (mut a, mut b) = (ends(&self.counts), ends(&other.counts));
        let (mut one, mut two) = (a.next(), b.next());
        let mut place = 0;
        while let (Some((end, inside)), Some((other_end, other_inside))) = (one, two) {
            let next = end.min(other_end);
            runs.push(inside || other_inside, (next - place) as u32);
            place = next;
            if end == next {
                one = a.next();
            }
            if other_end == next {
                two = b.next();
            }
        }
        Self { size: self.size, counts: runs.counts }
    }

    /// Pixels of the object within the columns `x0..x1` and rows `y0..y1`.
    pub(in crate::sam) fn area_within(&self, [x0, y0, x1, y1]: [u32; 4]) -> u64 {
        let inside = self.pieces().filter(|(x, ..)| (x0..x1).contains(x));
        inside.map(|(_, from, to)| u64::from(to.min(y1).saturating_sub(from.max(y0)))).sum()
    }
}
