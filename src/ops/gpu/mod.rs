//! The fused operations on the GPU: what each hands to [`crate::launch`], and what comes back.

pub mod adamw;
pub mod chain;
pub mod choice;
pub mod concat;
pub mod conv_columns;
pub mod dora;
pub mod dropout;
pub mod layer_norm;
pub mod multi_head;
pub mod projection;
pub mod recorded;
pub mod rel_pos_attention;
mod self_test;

pub use self_test::self_test_report;
