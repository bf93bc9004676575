//! Counter-based random numbers (Philox4x32-7) and the dropout masks made of them.
//!
//! A mask is a pure function of *where an element is*: seed, stream (which layer), row and column. So it is the
//! same for every tiling and on every device, and the backward regenerates it instead of storing it.
//!
//! ```text
//! key     = (seed low, seed high)
//! counter = (col / 8, row low, row high, stream)
//! lane    = col % 8: 16 bits of the four output words, low half first
//! keep    = lane >= round(p * 65536),   kept values are scaled by 65536 / (65536 - threshold)
//! ```
//!
//! Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. Seven rounds pass
//! BigCrush; the known answers of the authors' Random123 library are tested below.

use candle_core::{bail, Result};
use pulp::{Arch, Simd, WithSimd};

const ROUNDS: usize = 7;
const MULTIPLIER: [u32; 2] = [0xD251_1F53, 0xCD9E_8D57];
const WEYL: [u32; 2] = [0x9E37_79B9, 0xBB67_AE85];

/// Elements that the words of one counter are for.
const BLOCK: usize = 8;
/// Counters that are computed side by side: a vector of 64-bit products.
const LANES: usize = 8;

/// Philox4x32-7: four random words for one counter under one key.
#[inline]
pub fn philox4x32(counter: [u32; 4], key: [u32; 2]) -> [u32; 4] {
    philox4x32_lanes(counter.map(|word| [word]), key).map(|[word]| word)
}

/// As [`philox4x32`] for `N` counters, each word of all of them together.
#[inline(always)]
fn philox4x32_lanes<const N: usize>(
    mut counter: [[u32; N]; 4],
    mut key: [u32; 2],
) -> [[u32; N]; 4] {
    for _ in 0..ROUNDS {
        let [c0, c1, c2, c3] = counter;
        for i in 0..N {
            let product0 = u64::from(MULTIPLIER[0]) * u64::from(c0[i]);
            let product1 = u64::from(MULTIPLIER[1]) * u64::from(c2[i]);
            counter[0][i] = (product1 >> 32) as u32 ^ c1[i] ^ key[0];
            counter[1][i] = product1 as u32;
            counter[2][i] = (product0 >> 32) as u32 ^ c3[i] ^ key[1];
            counter[3][i] = product0 as u32;
        }
        key = [key[0].wrapping_add(WEYL[0]), key[1].wrapping_add(WEYL[1])];
    }
    counter
}

/// Dropout of whole groups of `LANES` counters: `values` starts at counter `first` of the row.
struct Groups<'a> {
    dropout: &'a Dropout,
    row: u64,
    first: usize,
    values: &'a mut [f32],
}

impl WithSimd for Groups<'_> {
    type Output = ();

    // The compiler makes the vectors: all that this takes from the instruction set is its name.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let (threshold, scale) = (self.dropout.threshold(), self.dropout.scale());
        for (group, values) in self.values.chunks_exact_mut(LANES * BLOCK).enumerate() {
            let first = self.first + group * LANES;
            let counter = [
                std::array::from_fn(|lane| (first + lane) as u32),
                [self.row as u32; LANES],
                [(self.row >> 32) as u32; LANES],
                [self.dropout.stream; LANES],
            ];
            let words = philox4x32_lanes(counter, self.dropout.key());
            let mut in_order = [0u32; LANES * BLOCK / 2];
            for lane in 0..LANES {
                for (index, words) in words.iter().enumerate() {
                    in_order[lane * BLOCK / 2 + index] = words[lane];
                }
            }
            let mut factors = [0f32; LANES * BLOCK];
            for (index, word) in in_order.into_iter().enumerate() {
                factors[2 * index] = if word & 0xFFFF >= threshold { scale } else { 0.0 };
                factors[2 * index + 1] = if word >> 16 >= threshold { scale } else { 0.0 };
            }
            for (value, factor) in values.iter_mut().zip(factors) {
                *value = if factor > 0.0 { *value * factor } else { 0.0 };
            }
        }
    }
}

/// Dropout as the operations take it: a probability and the address of the mask.
///
/// [Example](crate::ops::dropout())
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Dropout {
    /// Probability that an element is dropped, in `[0, 1)`; rounded to a multiple of 2^-16.
    pub p: f64,
    /// Seed of this forward pass.
    pub seed: u64,
    /// Which layer: layers with different streams have independent masks.
    pub stream: u32,
}

impl Dropout {
    /// The operation's name, as errors give it.
    pub(crate) const OP: &'static str = "dropout";

    /// Checks that `p` is a probability below 1.
    pub(crate) fn validate(&self, op: &'static str) -> Result<()> {
        if !Self::is_probability(self.p) {
            bail!("{op}: dropout probability must be in {}, got {}", Self::RANGE, self.p)
        }
        Ok(())
    }

    /// Probabilities that a mask can have, as errors give them.
    pub(crate) const RANGE: &'static str = "[0, 1) and below 1 - 2^-17";

    /// Whether `p` drops less than everything, rounded as masks round it.
    pub(crate) fn is_probability(p: f64) -> bool {
        let dropout = Self { p, seed: 0, stream: 0 };
        (0.0..1.0).contains(&p) && dropout.threshold() < 65536
    }

    /// An element is kept if its 16 bits are at least this.
    pub(crate) fn threshold(&self) -> u32 {
        (self.p * 65536.0).round() as u32
    }

    /// Factor of the kept elements: one over the exact probability of keeping one.
    pub(crate) fn scale(&self) -> f32 {
        (65536.0 / (65536.0 - f64::from(self.threshold()))) as f32
    }

    fn key(&self) -> [u32; 2] {
        [self.seed as u32, (self.seed >> 32) as u32]
    }

    /// Multiplies `values`, the elements `col..col + values.len()` of `row`, by their mask and scale.
    pub(crate) fn apply_row(&self, row: u64, col: usize, values: &mut [f32]) {
        let before = (col.next_multiple_of(BLOCK) - col).min(values.len());
        let (head, values) = values.split_at_mut(before);
        let (groups, tail) = values.split_at_mut(values.len() / (LANES * BLOCK) * LANES * BLOCK);
        self.apply_elements(row, col, head);
        self.apply_elements(row, col + before + groups.len(), tail);
        if !groups.is_empty() {
            let first = (col + before) / BLOCK;
            Arch::new().dispatch(Groups { dropout: self, row, first, values: groups });
        }
    }

    /// As [`apply_row`](Self::apply_row), one by one.
    fn apply_elements(&self, row: u64, col: usize, values: &mut [f32]) {
        let (threshold, scale) = (self.threshold(), self.scale());
        let mut words = [0u32; 4];
        let mut group = usize::MAX;
        for (offset, value) in values.iter_mut().enumerate() {
            let (block, lane) = ((col + offset) / BLOCK, (col + offset) % BLOCK);
            if block != group {
                group = block;
                let counter = [block as u32, row as u32, (row >> 32) as u32, self.stream];
                words = philox4x32(counter, self.key());
            }
            let bits = (words[lane / 2] >> (16 * (lane % 2))) & 0xFFFF;
            *value = if bits >= threshold { *value * scale } else { 0.0 };
        }
    }

    /// The mask times the scale for `rows` x `cols` elements, row-major.
    pub fn mask(&self, rows: usize, cols: usize) -> Vec<f32> {
        let mut mask = vec![1f32; rows * cols];
        for (row, values) in mask.chunks_mut(cols.max(1)).enumerate() {
            self.apply_row(row as u64, 0, values);
        }
        mask
    }
}

/// The stream of a layer: 32-bit FNV-1a of its dotted name.
///
/// [Example](crate::ops::dropout())
pub fn stream_of(name: &str) -> u32 {
    name.bytes().fold(0x811C_9DC5, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_answers_of_random123() {
        assert_eq!(
            philox4x32([0; 4], [0; 2]),
            [0x5f6f_b709, 0x0d89_3f64, 0x4f12_1f81, 0x4f73_0a48]
        );
        assert_eq!(
            philox4x32([u32::MAX; 4], [u32::MAX; 2]),
            [0x5207_ddc2, 0x4516_5e59, 0x4d8e_e751, 0x8c52_f662]
        );
    }

    #[test]
    fn keep_rate_is_unbiased_and_streams_differ() {
        let dropout = Dropout { p: 0.1, seed: 7, stream: stream_of("q") };
        let mask = dropout.mask(1000, 100);
        let kept = mask.iter().filter(|&&m| m > 0.0).count() as f64;
        let (n, p) = (1e5, 1.0 - 6554.0 / 65536.0);
        assert!((kept - n * p).abs() < 4.0 * (n * p * (1.0 - p)).sqrt(), "kept {kept}");
        let other = Dropout { stream: stream_of("v"), ..dropout }.mask(1000, 100);
        let both = mask.iter().zip(&other).filter(|(a, b)| **a > 0.0 && **b > 0.0).count() as f64;
        assert!((both - n * p * p).abs() < 4.0 * (n * p * p * (1.0 - p * p)).sqrt(), "both {both}");
    }

    #[test]
    fn any_part_of_a_row_has_the_mask_of_the_whole() {
        let dropout = Dropout { p: 0.5, seed: 1 << 40, stream: 3 };
        // Longer than a group, which is computed by other code than single elements.
        let mut whole = vec![1f32; 5 * LANES * BLOCK];
        dropout.apply_row(5_000_000_000, 0, &mut whole);
        for (start, length) in [(11, 20), (3, 200), (64, 65), (0, 7)] {
            let mut part = vec![1f32; length];
            dropout.apply_row(5_000_000_000, start, &mut part);
            assert_eq!(part, whole[start..start + length], "{start}, {length}");
        }
    }
}
