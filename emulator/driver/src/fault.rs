//! Kernels that compute wrongly, as after a compiler's mistake: for tests of what notices it.
//!
//! `EMULATED_FAULT` lists prefixes of kernels' names, separated by commas. The second half of such a kernel's output is
//! wrong. One bit of every 16 is flipped: a 16th of an f16, half of a bf16 or f32.

use crate::memory;
use crate::Outcome;

const FLIPPED: u8 = 1 << 6;

/// Whether the kernel of this name is to compute wrongly.
pub fn is_planted(kernel: &str) -> bool {
    let Ok(faults) = std::env::var("EMULATED_FAULT") else { return false };
    faults.split(',').any(|prefix| !prefix.is_empty() && kernel.starts_with(prefix))
}

/// Runs a kernel and spoils what it wrote to the memory that its params point to.
pub fn run(params: &[u8], kernel: impl FnOnce() -> Outcome) -> Outcome {
    let words = params.chunks_exact(8).filter_map(|word| word.try_into().ok());
    let mut memory: Vec<(u64, usize)> =
        words.filter_map(|word| memory::holding(u64::from_ne_bytes(word))).collect();
    memory.sort_unstable();
    memory.dedup();
    // SAFETY: live memory of this length, which nobody else writes while a kernel runs.
    let read = |(start, bytes): (u64, usize)| unsafe {
        std::slice::from_raw_parts(start as *const u8, bytes).to_vec()
    };
    let before: Vec<Vec<u8>> = memory.iter().map(|&at| read(at)).collect();
    kernel()?;
    for (&(start, bytes), before) in memory.iter().zip(&before) {
        let after = read((start, bytes));
        let differs = |index: &usize| after[*index..][..2] != before[*index..][..2];
        let written: Vec<usize> = (0..bytes.saturating_sub(1)).step_by(2).filter(differs).collect();
        for &index in &written[written.len() / 2..] {
            // SAFETY: within that memory.
            unsafe { *((start as usize + index) as *mut u8) ^= FLIPPED };
        }
    }
    Ok(())
}
