//! The tiles that were fastest on a GPU: written by `scripts/gpu/run.sh tune`, read by [`super::tiles`].
//!
//! Nothing has been measured yet.

use super::tiles::Measured;

/// In the order of their families.
pub const MEASURED: &[Measured] = &[];
