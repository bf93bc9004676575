//! The kernels' own sources, run by the emulator through the same launch code as on a GPU.
//!
//! Each family of kernels is a module here, and nothing else has to know of it: the sanitized runs are this suite too
//! (`scripts/sanitize-kernels.sh`). Every case runs late and early with three seeds and must give the same bits; for a
//! sanitizer of addresses one seed is enough.

mod adamw;
mod attention_case;
#[path = "../common/mod.rs"]
mod common;
mod concat;
mod conv_columns;
mod device;
mod dora;
mod dropout;
mod instructions;
mod instructions_sm90;
mod layer_norm;
mod multi_head;
mod projection;
mod projection_case;
mod projection_sm90;
mod rel_pos_attention;
mod rel_pos_attention_bwd_sm90;
mod rel_pos_attention_limits;
mod rel_pos_attention_sm90;
mod rel_pos_attention_window_sm90;
mod tiles;
