//! Of each problem the fastest tile whose results are right, and the table of these as a Rust file. What measures is
//! handed in.

use anyhow::Result;
use candle_sam_lora::launch::tiles::Measured;
use std::fmt::Write;

/// What is to be given a tile.
pub struct Problem<W> {
    pub family: &'static str,
    pub bytes: usize,
    pub shape: [usize; 2],
    pub rows: usize,
    /// Today's first, which of equals is taken.
    pub tiles: Vec<&'static str>,
    /// What the measurement wants to know.
    pub work: W,
}

/// What one tile did.
#[derive(Clone, Debug)]
pub struct Outcome {
    pub seconds: f64,
    /// Of the results, against the reference; and what is allowed.
    pub error: f64,
    pub bound: f64,
}

/// A problem's tiles, each with what it did or why it did nothing, and the one to take.
pub struct Swept {
    pub family: &'static str,
    pub bytes: usize,
    pub shape: [usize; 2],
    pub rows: usize,
    pub outcomes: Vec<(&'static str, Result<Outcome>)>,
    pub best: Option<&'static str>,
}

/// Another tile than the first must be faster by more than this, of the first's time: runs differ by as much.
const NOISE: f64 = 0.02;

/// Measures problem by problem as long as there is time, and reports all so far after each. One that was not measured
/// to the end is left out: its tile stays.
pub fn sweep<W>(
    problems: &[Problem<W>],
    mut in_time: impl FnMut() -> bool,
    mut measure: impl FnMut(&Problem<W>, &'static str) -> Result<Outcome>,
    mut report: impl FnMut(&[Swept]) -> Result<()>,
) -> Result<Vec<Swept>> {
    let mut all = Vec::new();
    'problems: for problem in problems {
        let mut outcomes = Vec::new();
        for tile in &problem.tiles {
            if !in_time() {
                break 'problems;
            }
            outcomes.push((*tile, measure(problem, tile)));
        }
        let &Problem { family, bytes, shape, rows, .. } = problem;
        let best = best(&outcomes);
        all.push(Swept { family, bytes, shape, rows, outcomes, best });
        report(&all)?;
    }
    Ok(all)
}

/// The fastest of those that are right; the first unless another is faster beyond doubt.
fn best(outcomes: &[(&'static str, Result<Outcome>)]) -> Option<&'static str> {
    let right = |(index, (tile, outcome)): (usize, &(&'static str, Result<Outcome>))| {
        let outcome = outcome.as_ref().ok()?;
        // Not `error > bound`: NaN is not right.
        let seconds = outcome.seconds * if index == 0 { 1.0 - NOISE } else { 1.0 };
        (outcome.error <= outcome.bound && seconds > 0.0).then_some((seconds, *tile))
    };
    let right = outcomes.iter().enumerate().filter_map(right);
    right.min_by(|(a, _), (b, _)| a.total_cmp(b)).map(|(_, tile)| tile)
}

/// The table so far, with what was measured in the place of rows of the same problems.
pub fn merge(table: &[Measured], swept: &[Swept]) -> Vec<Measured> {
    let new = swept.iter().filter_map(|s| {
        let &Swept { family, bytes, shape, rows, best, .. } = s;
        best.map(|tile| Measured { family, bytes, shape, rows, tile })
    });
    let new: Vec<_> = new.collect();
    let key = |row: &Measured| (row.family, row.bytes, row.shape, row.rows);
    let old = table.iter().filter(|row| new.iter().all(|new| key(new) != key(row)));
    let mut rows: Vec<_> = old.copied().chain(new.iter().copied()).collect();
    rows.sort_by_key(key);
    rows
}

/// `src/launch/measured.rs` of these rows; `how` is what its first lines say of the measurement.
pub fn source(rows: &[Measured], how: &str) -> String {
    let mut text = format!(
        "//! The tiles that were fastest on a GPU: written by `scripts/gpu/run.sh tune`, read by [`super::tiles`].\n//!\n\
         //! {how}\n\nuse super::tiles::Measured;\n\n/// In the order of their families.\n"
    );
    if rows.is_empty() {
        text += "pub const MEASURED: &[Measured] = &[];\n";
        return text;
    }
    text += "#[rustfmt::skip]\npub const MEASURED: &[Measured] = &[\n";
    for Measured { family, bytes, shape, rows, tile } in rows {
        // Writing into a string does not fail.
        let _ = writeln!(
            text,
            "    Measured {{ family: {family:?}, bytes: {bytes}, shape: {shape:?}, rows: {rows}, tile: {tile:?} }},"
        );
    }
    text + "];\n"
}
