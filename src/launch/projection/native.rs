//! The functions that an architecture with kernels of its own offers.

use super::portable::{ForwardOperands, Problem};
use super::portable_backward::BackwardOperands;
use crate::launch::family::Family;
use crate::launch::{Gpu, Launch};
use candle_core::{DType, Result};

/// None, where launches are optional, leaves operands that the kernels do not take to the portable ones.
pub(super) struct Native {
    /// The family that computes a problem; none if the portable kernels do.
    pub family: fn(&Problem<'_>, DType, &Gpu) -> Option<Family>,
    /// The launches for S and the output.
    pub forward: fn(&Problem<'_>, DType, &ForwardOperands<'_>, &Gpu) -> Launches,
    /// The launches for the gradients.
    pub backward: fn(&Problem<'_>, DType, &BackwardOperands<'_>, &Gpu) -> Launches,
}

type Launches = Result<Option<Vec<Launch>>>;
