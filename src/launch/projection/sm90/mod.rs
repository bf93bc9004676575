//! Projections on Hopper: persistent kernels, and the tiles that they have.

pub mod backward;
pub mod forward;
pub mod tile;
pub mod tiles;

use super::native::Native;
use super::portable::Problem;
use crate::launch::family::Family;
use crate::launch::Gpu;
use candle_core::DType;

pub(super) const NATIVE: Native =
    Native { family, forward: forward::forward, backward: backward::backward };

fn family(problem: &Problem<'_>, dtype: DType, gpu: &Gpu) -> Option<Family> {
    forward::covers(problem, dtype, gpu).then_some(Family::Projection)
}
