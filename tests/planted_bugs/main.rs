//! Bugs planted in copies of the kernels, one at a time, each of which the emulator or the result must show.
//!
//! A [`Subject`](harness::Subject) runs kernels from such a copy; a [`Bug`](harness::Bug) is a row of the subject's
//! table. Each row is a test: `cargo test --release --test planted_bugs -- 'gemm: '` runs the rows of one subject.

mod attention;
#[path = "../kernels/attention_case.rs"]
mod attention_case;
mod attention_sm90;
mod cluster_sm90;
#[path = "../common/mod.rs"]
mod common;
#[path = "../kernels/device.rs"]
mod device;
mod gemm;
mod gemm_sm90;
mod harness;
mod projection;
#[path = "../kernels/projection_case.rs"]
mod projection_case;
mod projection_sm90;
mod sanitizer;

use libtest_mimic::Arguments;
use std::process::ExitCode;

fn main() -> ExitCode {
    let tables = [
        gemm::TABLE,
        attention::TABLE,
        projection::TABLE,
        gemm_sm90::TABLE,
        cluster_sm90::TABLE,
        attention_sm90::TABLE,
        projection_sm90::TABLE,
    ];
    let rows = tables.into_iter().flatten();
    let trials = rows.flat_map(|(subject, bugs)| bugs.iter().map(|bug| subject.trial(bug)));
    libtest_mimic::run(&Arguments::from_args(), trials.collect()).exit_code()
}
