//! The table of the kernels' tiles that the launches read, beside the kernels.

use crate::device::{cache, kernels};

#[test]
fn the_table_is_that_of_the_kernels() {
    let made = candle_sam_lora_emulator::tile_table(&kernels(), &cache());
    let made = made.unwrap_or_else(|error| panic!("{error}"));
    let kept = include_str!("../../src/launch/tile_table.rs");
    assert!(made == kept, "the tiles have changed: run scripts/bindings.sh; now they are\n{made}");
}
