//! Random draws that are a pure function of (seed, stream, step, how many were drawn before).
//!
//! A resumed run needs no generator state: it draws again from its seed and step. The numbers are those of
//! [`crate::philox`], with `counter = (draw / 4, step low, step high, stream)`.

use crate::philox::{philox4x32, stream_of};

/// The draws of one step of one stream.
///
/// [Example](crate::train::PromptKind)
#[derive(Clone, Debug)]
pub struct StepRng {
    key: [u32; 2],
    step: u64,
    stream: u32,
    drawn: u32,
    words: [u32; 4],
}

impl StepRng {
    /// The draws of `step`; streams of different names are independent.
    pub fn new(seed: u64, stream: &str, step: u64) -> Self {
        let key = [seed as u32, (seed >> 32) as u32];
        Self { key, step, stream: stream_of(stream), drawn: 0, words: [0; 4] }
    }

    /// 32 random bits.
    pub fn bits(&mut self) -> u32 {
        let lane = (self.drawn % 4) as usize;
        if lane == 0 {
            let step = [self.step as u32, (self.step >> 32) as u32];
            let counter = [self.drawn / 4, step[0], step[1], self.stream];
            self.words = philox4x32(counter, self.key);
        }
        self.drawn = self.drawn.wrapping_add(1);
        self.words[lane]
    }

    /// 64 random bits.
    pub fn bits64(&mut self) -> u64 {
        u64::from(self.bits()) << 32 | u64::from(self.bits())
    }

    /// Uniform in `0..n`; without bias (Lemire's method) up to 2^32, above with one of n / 2^64 at most. 0 for 0.
    pub fn below(&mut self, n: usize) -> usize {
        let n = n as u64;
        if n > 1 << 32 {
            return ((u128::from(self.bits64()) * u128::from(n)) >> 64) as usize;
        }
        let biased = (1u64 << 32) % n.max(1);
        loop {
            let product = u64::from(self.bits()) * n;
            if product & 0xFFFF_FFFF >= biased {
                return (product >> 32) as usize;
            }
        }
    }

    /// Uniform in `[0, 1)`, a multiple of 2^-32.
    pub fn uniform(&mut self) -> f64 {
        f64::from(self.bits()) / 4_294_967_296.0
    }

    /// `0..n` in random order (Fisher and Yates).
    pub fn permutation(&mut self, n: usize) -> Vec<usize> {
        let mut order: Vec<usize> = (0..n).collect();
        for last in (1..n).rev() {
            order.swap(last, self.below(last + 1));
        }
        order
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn draws_depend_on_seed_stream_and_step_alone() {
        let draw = |seed, stream, step| StepRng::new(seed, stream, step).bits64();
        assert_eq!(draw(1, "a", 5), draw(1, "a", 5));
        let all = [draw(1, "a", 5), draw(2, "a", 5), draw(1, "b", 5), draw(1, "a", 6)];
        assert!((1..4).all(|i| !all[..i].contains(&all[i])), "{all:?}");
    }

    #[test]
    fn below_is_uniform() {
        let mut draws = StepRng::new(3, "below", 0);
        let mut counts = [0f64; 7];
        (0..70_000).for_each(|_| counts[draws.below(7)] += 1.0);
        // 22.46 is the 0.999 quantile of chi-square with 6 degrees of freedom.
        let chi2: f64 = counts.iter().map(|c| (c - 1e4) * (c - 1e4) / 1e4).sum();
        assert!(chi2 < 22.46, "chi-square {chi2}, counts {counts:?}");
    }

    #[test]
    fn below_takes_every_number() {
        let mut draws = StepRng::new(3, "below", 0);
        assert_eq!((draws.below(0), draws.below(1)), (0, 0));
        let half = usize::MAX / 2;
        let high = (0..1000).filter(|_| draws.below(usize::MAX) > half).count();
        assert!((400..600).contains(&high), "{high} of 1000 in the upper half");
    }

    #[test]
    fn a_permutation_has_everything_once() {
        let mut order = StepRng::new(9, "permutation", 2).permutation(50);
        assert_ne!(order, (0..50).collect::<Vec<_>>());
        order.sort_unstable();
        assert_eq!(order, (0..50).collect::<Vec<_>>());
    }
}
