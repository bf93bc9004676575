//! Kernels that compute wrongly, as after a compiler's mistake: for tests of what notices it.
//!
//! `EMULATED_FAULT` lists prefixes of kernels' names, separated by commas. The second half of such a kernel's output is
//! wrong. One bit of every 16 is flipped: a 16th of an f16, half of a bf16 or f32.
//!
//! `EMULATED_BAKED_SEED` lists prefixes too. Such a kernel drops by the seeds of its first run in each replay of a
//! graph.

use crate::memory;
use crate::Outcome;

const FLIPPED: u8 = 1 << 6;

/// DROPOUT_SEED_AT of kernels/abi.h.
const SEED_AT: u32 = 0x10000;

/// Whether the kernel of this name is to compute wrongly.
pub fn is_planted(kernel: &str) -> bool {
    is_listed("EMULATED_FAULT", kernel)
}

/// Whether the kernel of this name is to keep the seeds of its first run.
pub fn bakes_seeds(kernel: &str) -> bool {
    is_listed("EMULATED_BAKED_SEED", kernel)
}

fn is_listed(variable: &str, kernel: &str) -> bool {
    let Ok(prefixes) = std::env::var(variable) else { return false };
    prefixes.split(',').any(|prefix| !prefix.is_empty() && kernel.starts_with(prefix))
}

/// The params with the seeds in place of their addresses: words that end with a threshold above `SEED_AT` are a mask.
pub fn with_baked_seeds(params: &[u8]) -> Vec<u8> {
    let mut params = params.to_vec();
    for at in (0..params.len().saturating_sub(15)).step_by(4) {
        let Some(&[address @ .., _, _, _, _, a, b, c, d]) = params[at..].first_chunk::<16>() else {
            break;
        };
        let (address, threshold) = (u64::from_ne_bytes(address), u32::from_ne_bytes([a, b, c, d]));
        if (SEED_AT..2 * SEED_AT).contains(&threshold) && memory::check(address, 8).is_ok() {
            // SAFETY: eight bytes of live memory, which nobody writes while a kernel runs.
            let seed = unsafe { (address as *const [u8; 8]).read() };
            params[at..at + 8].copy_from_slice(&seed);
            params[at + 12..at + 16].copy_from_slice(&(threshold - SEED_AT).to_ne_bytes());
        }
    }
    params
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
