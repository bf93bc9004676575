//! The functions that an architecture with kernels of its own offers.

use super::portable::{BackwardOperands, Inputs};
use crate::launch::family::Family;
use crate::launch::plan::Plan;
use crate::launch::{device_ptr, AttentionProblem, Gpu, Launch};
use candle_core::{DType, Result};

/// None, where launches are optional, leaves operands that the kernels do not take to the portable ones.
pub(super) struct Native {
    /// The family that computes a problem; none if the portable kernels do.
    pub family: fn(&AttentionProblem, DType) -> Option<Family>,
    /// The launches for `out` and `lse` of the inputs.
    pub forward: Forward,
    /// The launches for the gradients, with the scratch memory that they take.
    pub backward: Backward,
}

type Launches = Result<Option<Vec<Launch>>>;
type Forward = fn(&AttentionProblem, DType, &Inputs, [device_ptr; 2], &Gpu) -> Launches;
type Backward =
    fn(&AttentionProblem, DType, &Inputs, &BackwardOperands, &Gpu) -> Result<Option<Plan>>;
