//! The kernels' own sources, run by the emulator through the same launch code as on a GPU.
//!
//! Each family of kernels is a module here, and nothing else has to know of it: the sanitized runs are this suite too
//! (`scripts/sanitize-kernels.sh`). Every case runs late and early with three seeds and must give the same bits.

mod common;
#[path = "kernels/device.rs"]
mod device;
#[path = "kernels/dora.rs"]
mod dora;
#[path = "kernels/dropout.rs"]
mod dropout;
#[path = "kernels/instructions.rs"]
mod instructions;
#[path = "kernels/instructions_sm90.rs"]
mod instructions_sm90;
#[path = "kernels/layer_norm.rs"]
mod layer_norm;
#[path = "kernels/projection.rs"]
mod projection;
#[path = "kernels/projection_sm90.rs"]
mod projection_sm90;
#[path = "kernels/rel_pos_attention.rs"]
mod rel_pos_attention;
#[path = "kernels/rel_pos_attention_bwd_sm90.rs"]
mod rel_pos_attention_bwd_sm90;
#[path = "kernels/rel_pos_attention_limits.rs"]
mod rel_pos_attention_limits;
#[path = "kernels/rel_pos_attention_sm90.rs"]
mod rel_pos_attention_sm90;
#[path = "kernels/rel_pos_attention_window_sm90.rs"]
mod rel_pos_attention_window_sm90;
#[path = "kernels/tiles.rs"]
mod tiles;
