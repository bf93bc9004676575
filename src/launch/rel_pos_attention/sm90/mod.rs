//! Attention on Hopper: whole grids in a forward and two backward passes, windows in one kernel each.

pub mod backward;
pub mod forward;
pub mod tiles;
pub mod windows;
