//! The choice of tiles, with a clock and measurements that are made up: without a GPU.

#[path = "gpu/sweep.rs"]
mod sweep;

use anyhow::bail;
use candle_sam_lora::launch::measured::MEASURED;
use candle_sam_lora::launch::tiles::Measured;
use std::cell::Cell;
use sweep::{merge, source, sweep, Outcome, Problem, Swept};

const FAMILY: &str = "projection_fwd";

/// Tiles with their seconds and errors, none if the tile fails, for rows of 1, 2, ...
type Plan = Vec<(&'static str, Option<(f64, f64)>)>;

fn swept(plans: &[Plan], seconds: f64) -> Vec<Swept> {
    let problem = |(index, plan): (usize, &Plan)| Problem {
        family: FAMILY,
        bytes: 2,
        shape: [768, 2304],
        rows: index + 1,
        tiles: plan.iter().map(|(tile, _)| *tile).collect(),
        work: plan.clone(),
    };
    let problems: Vec<_> = plans.iter().enumerate().map(problem).collect();
    let spent = Cell::new(0.0);
    let measure = |problem: &Problem<Plan>, tile: &'static str| {
        let Some((_, Some((seconds, error)))) = problem.work.iter().find(|(t, _)| *t == tile)
        else {
            bail!("{tile} does not run")
        };
        spent.set(spent.get() + seconds);
        Ok(Outcome { seconds: *seconds, error: *error, bound: 0.01 })
    };
    sweep(&problems, || spent.get() < seconds, measure, |_| Ok(())).unwrap()
}

fn best(plan: Plan) -> Option<&'static str> {
    swept(&[plan], 1e9)[0].best
}

#[test]
fn the_fastest_tile_that_is_right_is_taken() {
    let right = |seconds| Some((seconds, 1e-3));
    assert_eq!(best(vec![("a", right(3.0)), ("b", right(1.0)), ("c", right(2.0))]), Some("b"));
    let wrong = Some((0.5, 0.02));
    assert_eq!(best(vec![("a", right(3.0)), ("b", wrong), ("c", right(2.0))]), Some("c"));
    let not_a_number = Some((0.5, f64::NAN));
    assert_eq!(best(vec![("a", right(3.0)), ("b", not_a_number), ("c", None)]), Some("a"));
    assert_eq!(best(vec![("a", wrong), ("b", None)]), None);
}

#[test]
fn within_the_noise_the_first_tile_is_taken() {
    let right = |seconds| Some((seconds, 0.0));
    assert_eq!(best(vec![("a", right(1.0)), ("b", right(0.99))]), Some("a"));
    assert_eq!(best(vec![("a", right(1.0)), ("b", right(0.97))]), Some("b"));
}

#[test]
fn when_the_time_is_over_what_was_measured_stays() {
    let plan: Plan = vec![("a", Some((2.0, 0.0))), ("b", Some((1.0, 0.0)))];
    let found = swept(&[plan.clone(), plan.clone(), plan], 4.0);
    // The second problem's second tile was not begun.
    assert_eq!(found.len(), 1);
    assert_eq!((found[0].rows, found[0].best), (1, Some("b")));
    assert_eq!(found[0].outcomes.len(), 2);
}

#[test]
fn new_rows_take_the_place_of_old_ones() {
    let row = |rows, tile| Measured { family: FAMILY, bytes: 2, shape: [768, 2304], rows, tile };
    let old = [row(1, "a"), row(7, "a")];
    let found = swept(&[vec![("a", Some((2.0, 0.0))), ("b", Some((1.0, 0.0)))]], 1e9);
    assert_eq!(merge(&old, &found), [row(1, "b"), row(7, "a")]);
}

#[test]
fn the_table_that_is_there_is_one_that_is_written() {
    let there = include_str!("../src/launch/measured.rs");
    let how = there.lines().nth(2).unwrap().trim_start_matches("//! ");
    assert_eq!(source(MEASURED, how), there);
}

/// Behind the type that it uses, a table is a program of its own; the compiler reads it back.
#[test]
fn a_table_compiles_to_its_rows() {
    let row = |rows, tile| Measured { family: FAMILY, bytes: 2, shape: [768, 2304], rows, tile };
    let rows = [row(4096, "64x64"), row(16384, "128x128")];
    let table = source(&rows, "Made up.");
    let table = table.replace("//!", "//").replace("use super::tiles::Measured;", "");
    let program = format!(
        "#[derive(Debug)] #[allow(dead_code)] pub struct Measured {{ family: &'static str, bytes: usize, \
         shape: [usize; 2], rows: usize, tile: &'static str }}\n{table}\
         fn main() {{ print!(\"{{MEASURED:?}}\") }}"
    );
    // Where programs may be run, as they need not in a system's folder for temporary files.
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (source, binary) = (folder.path().join("table.rs"), folder.path().join("table"));
    std::fs::write(&source, program).unwrap();
    let rustc = std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into());
    let compile = std::process::Command::new(rustc)
        .args(["--edition", "2021", "-o"])
        .args([&binary, &source])
        .status();
    assert!(compile.unwrap().success());
    let printed = std::process::Command::new(binary).output().unwrap().stdout;
    assert_eq!(String::from_utf8(printed).unwrap(), format!("{rows:?}"));
}
