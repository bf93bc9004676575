//! Files that people have: checkpoints and images, damaged ones among them.

mod checkpoint;
#[path = "../common/mod.rs"]
mod common;
mod hostile;
mod images;
mod torch;
