//! The operations against their oracles.

mod activations;
mod attention_limits;
mod blocks;
#[path = "../common/mod.rs"]
mod common;
mod composed_events;
mod errors;
mod properties;
mod pytorch;
mod reference;
mod row_sums;
