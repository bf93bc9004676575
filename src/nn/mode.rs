//! Whether a forward pass trains or evaluates, and with which dropout masks.

use crate::philox::Dropout;

/// Passed to every `forward`: evaluation, or training with the seed of this pass's dropout masks.
///
/// The same seed gives the same masks, so a pass can be repeated exactly; take a new seed for every step.
///
/// [Example](crate::nn::load())
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// No dropout.
    Eval,
    /// Dropout with the masks of this seed.
    Train {
        /// Seed of this pass.
        seed: u64,
    },
}

impl Mode {
    /// The dropout of a layer in this pass: none in evaluation or with `p == 0`.
    pub fn dropout(self, p: f64, stream: u32) -> Option<Dropout> {
        match self {
            Mode::Train { seed } if p > 0.0 => Some(Dropout { p, seed, stream }),
            _ => None,
        }
    }
}
