//! Memory, by an allocator that keeps count of the whole process: one test after the other.

mod attention;
#[path = "../common/mod.rs"]
mod common;
mod counting;
mod encode;
mod gradient_checkpoint;
mod tiles;

use anyhow::Result;
use libtest_mimic::{Arguments, Trial};
use std::process::ExitCode;

/// A test's name, whether it runs only when asked for, and the test.
type Row = (&'static str, bool, fn() -> Result<()>);

const TESTS: [Row; 6] = [
    (
        "global_attention_is_linear_in_tokens",
        false,
        attention::global_attention_is_linear_in_tokens,
    ),
    (
        "a_hundred_encodes_leave_nothing_behind",
        false,
        encode::a_hundred_encodes_leave_nothing_behind,
    ),
    (
        "ten_thousand_encodes_leave_nothing_behind",
        true,
        encode::ten_thousand_encodes_leave_nothing_behind,
    ),
    (
        "memory_grows_by_one_tensor_a_layer",
        false,
        gradient_checkpoint::memory_grows_by_one_tensor_a_layer,
    ),
    ("tiles_take_the_memory_of_one", false, tiles::tiles_take_the_memory_of_one),
    (
        "a_gigabyte_of_pixels_takes_the_memory_of_one_tile",
        true,
        tiles::a_gigabyte_of_pixels_takes_the_memory_of_one_tile,
    ),
];

fn main() -> ExitCode {
    let trials = TESTS.map(|(name, ignored, test)| {
        Trial::test(name, move || Ok(test()?)).with_ignored_flag(ignored)
    });
    let arguments = Arguments { test_threads: Some(1), ..Arguments::from_args() };
    libtest_mimic::run(&arguments, trials.into()).exit_code()
}
