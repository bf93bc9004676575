//! Projections on Hopper: persistent kernels, and the tiles that they have.

pub mod backward;
pub mod forward;
pub mod tiles;
