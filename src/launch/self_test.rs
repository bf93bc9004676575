//! The findings of a self-test: errors, bounds, and the choice that follows. This module does not know how a family
//! runs.
//!
//! ```text
//! error = max |got - truth| / max |truth|           of each result: the output, each gradient
//! bound = 2 max(error of the composed graph, one rounding of the dtype), at most MOST_ROUNDINGS roundings
//! ```
//! The truth is computed in f32, from the inputs as the kernels get them. The composed graph is what a user would run
//! without the kernels, in the same dtype. A bound from a composed graph that is itself wrong would pass everything,
//! hence the limit.

use super::family::Family;
use candle_core::DType;
use std::fmt;

/// Candle adds up 16-bit gradients in 16 bits, which costs some roundings; a wrong result is off by hundreds.
const MOST_ROUNDINGS: f64 = 32.0;
/// Wrong results that a refusal names.
const MOST_FAULTS: usize = 3;

/// Who computes a family's problems, from the first choice to the last.
///
/// [Example](crate::guide::cuda)
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Choice {
    /// The kernels for the GPU's own architecture.
    Native,
    /// The kernels for every GPU.
    Portable,
    /// The composed graph of candle's operations.
    Composed,
}

impl fmt::Display for Choice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Native => "native",
            Self::Portable => "portable",
            Self::Composed => "composed",
        })
    }
}

/// One rounding, relative; in f32, of sums in another order.
fn rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1.0 / 2048.0,
        DType::BF16 => 1.0 / 256.0,
        _ => 1e-5,
    }
}

/// The largest error that a kernel may have where the composed graph has this one.
pub fn bound(composed: f64, dtype: DType) -> f64 {
    let rounding = rounding(dtype);
    // `min` takes the limit where the composed graph's error is NaN.
    (2.0 * composed.max(rounding)).min(MOST_ROUNDINGS * rounding)
}

/// The largest difference, relative to the largest true value; infinite if a value is not finite.
pub fn error(got: &[f32], truth: &[f32]) -> f64 {
    if got.len() != truth.len() || !got.iter().all(|x| x.is_finite()) {
        return f64::INFINITY;
    }
    let largest = |m: f64, x: f64| m.max(x.abs());
    let scale = truth.iter().fold(0.0, |m, &x| largest(m, x.into()));
    let differences = got.iter().zip(truth).map(|(&a, &b)| f64::from(a) - f64::from(b));
    differences.fold(0.0, largest) / if scale == 0.0 { 1.0 } else { scale }
}

/// One result of an operation: its output or a gradient.
///
/// [Example](crate::guide::cuda)
#[derive(Clone, Debug, PartialEq)]
pub struct Comparison {
    /// Its name, after the problem that it is a result of.
    pub result: String,
    /// The kernels' error.
    pub error: f64,
    /// The largest error that passes.
    pub bound: f64,
}

impl Comparison {
    /// Whether the error is within its bound.
    pub fn passed(&self) -> bool {
        self.error <= self.bound
    }

    fn excess(&self) -> f64 {
        self.error / self.bound
    }
}

impl fmt::Display for Comparison {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let sign = if self.passed() { "<=" } else { ">" };
        write!(f, "{} {:.1e} {sign} {:.1e}", self.result, self.error, self.bound)
    }
}

/// A row of the table: a family's kernels of one implementation in one dtype.
///
/// [Example](crate::guide::cuda)
#[derive(Clone, Debug, PartialEq)]
pub struct SelfTestRow {
    /// The tested family; `portable` rows are of the kernels that stand in for this family.
    pub family: Family,
    /// The dtype of the operands.
    pub dtype: DType,
    /// Native or portable.
    pub kernels: Choice,
    /// Every result of every problem.
    pub comparisons: Vec<Comparison>,
    /// Why the kernels did not run, if they did not.
    pub failure: Option<String>,
}

impl SelfTestRow {
    /// Whether the kernels ran and every result is within its bound.
    pub fn passed(&self) -> bool {
        let compared = !self.comparisons.is_empty();
        compared && self.failure.is_none() && self.comparisons.iter().all(Comparison::passed)
    }

    /// The result that comes closest to its bound, or exceeds it most.
    pub fn worst(&self) -> Option<&Comparison> {
        self.comparisons.iter().max_by(|a, b| a.excess().total_cmp(&b.excess()))
    }

    /// The faults in one line: the failure, or the results that exceed their bounds most.
    fn faults(&self) -> String {
        if let Some(failure) = &self.failure {
            return failure.split_whitespace().collect::<Vec<_>>().join(" ");
        }
        let mut faults: Vec<_> = self.comparisons.iter().filter(|c| !c.passed()).collect();
        faults.sort_by(|a, b| b.excess().total_cmp(&a.excess()));
        let (told, others) = faults.split_at(faults.len().min(MOST_FAULTS));
        let told: Vec<_> = told.iter().map(ToString::to_string).collect();
        match others.len() {
            0 => told.join(", "),
            others => format!("{} and {others} more", told.join(", ")),
        }
    }
}

/// The choice after these rows: the first kernels that passed, else the composed graph.
pub fn choice(rows: &[SelfTestRow]) -> Choice {
    rows.iter().find(|row| row.passed()).map_or(Choice::Composed, |row| row.kernels)
}

/// The line that says which kernels are not used, and why; none if the first ones passed.
pub fn refusal(rows: &[SelfTestRow], compiler: &str) -> Option<String> {
    let refused: Vec<_> = rows.iter().take_while(|row| !row.passed()).collect();
    let first = refused.first()?;
    let faults: Vec<_> =
        refused.iter().map(|row| format!("{} kernels: {}", row.kernels, row.faults())).collect();
    Some(format!(
        "self-test: {} in {} is wrong and not used: {} (kernels compiled by {compiler}); {} its place",
        first.family,
        first.dtype.as_str(),
        faults.join("; "),
        match choice(rows) {
            Choice::Composed => "the composed graph takes",
            _ => "the portable kernels take",
        }
    ))
}

/// A table of every family: its errors beside their bounds.
///
/// [Example](crate::guide::cuda)
#[derive(Clone, Debug, PartialEq)]
pub struct SelfTestReport {
    /// The GPU's name.
    pub device: String,
    /// The compiler of the kernels.
    pub compiler: &'static str,
    /// By family and dtype.
    pub rows: Vec<SelfTestRow>,
}

impl SelfTestReport {
    /// Whether every row passed.
    pub fn passed(&self) -> bool {
        self.rows.iter().all(SelfTestRow::passed)
    }
}

impl fmt::Display for SelfTestReport {
    /// One line a row, with the result that comes closest to its bound; below, every failure.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "{}, kernels compiled by {}", self.device, self.compiler)?;
        writeln!(
            f,
            "{:<22} {:<5} {:<8} {:<36} {:>8} {:>8}",
            "family", "dtype", "kernels", "worst result", "error", "bound"
        )?;
        for row in &self.rows {
            let family = row.family.to_string();
            let verdict = if row.passed() { "ok" } else { "refused" };
            write!(f, "{family:<22} {:<5} {:<8} ", row.dtype.as_str(), row.kernels)?;
            match row.worst() {
                Some(Comparison { result, error, bound }) => {
                    writeln!(f, "{result:<36} {error:>8.1e} {bound:>8.1e} {verdict}")?;
                }
                None => writeln!(f, "{:<36} {:>8} {:>8} {verdict}", "-", "-", "-")?,
            }
        }
        for row in &self.rows {
            if let Some(failure) = &row.failure {
                writeln!(f, "{} {}: {failure}", row.family, row.dtype.as_str())?;
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FAMILY: Family = Family::GlobalAttention { head_dim: 64 };

    fn row(kernels: Choice, error: f64) -> SelfTestRow {
        let comparison = |result: &str, error| Comparison {
            result: result.to_string(),
            error,
            bound: bound(0.0, DType::BF16),
        };
        let comparisons = vec![comparison("5x64 out", 2e-3), comparison("5x64 dk", error)];
        SelfTestRow { family: FAMILY, dtype: DType::BF16, kernels, comparisons, failure: None }
    }

    #[test]
    fn the_bound_is_twice_the_composed_graphs_error() {
        assert_eq!(bound(0.005, DType::F16), 0.01);
        assert_eq!(bound(0.01, DType::BF16), 0.02);
        // A result that the composed graph has exactly may still be rounded.
        assert_eq!(bound(0.0, DType::BF16), 2.0 / 256.0);
        // A composed graph that is wrong itself passes nothing wrong.
        for broken in [1.0, f64::INFINITY, f64::NAN] {
            assert!(bound(broken, DType::BF16) <= 0.125 && bound(broken, DType::F16) < 0.02);
        }
    }

    #[test]
    fn the_error_is_relative_to_the_largest_value() {
        assert_eq!(error(&[1.0, -2.5], &[1.0, -2.0]), 0.25);
        assert_eq!(error(&[0.5], &[0.0]), 0.5);
        for wrong in [&[f32::NAN, 0.0][..], &[f32::INFINITY, 0.0], &[0.0]] {
            assert_eq!(error(wrong, &[1.0, 0.0]), f64::INFINITY);
        }
    }

    #[test]
    fn the_first_kernels_that_pass_are_chosen() {
        let (native, portable) = (Choice::Native, Choice::Portable);
        assert_eq!(choice(&[row(native, 0.005)]), native);
        assert_eq!(choice(&[row(native, 0.9), row(portable, 0.005)]), portable);
        assert_eq!(choice(&[row(native, 0.9), row(portable, f64::INFINITY)]), Choice::Composed);
        assert_eq!(choice(&[row(native, f64::NAN), row(portable, 0.0)]), portable);
        // Kernels that did not run, or were compared with nothing, did not pass.
        let failed = SelfTestRow { failure: Some("no image".into()), ..row(native, 0.0) };
        let empty = SelfTestRow { comparisons: vec![], ..row(native, 0.0) };
        assert_eq!(choice(&[failed, empty]), Choice::Composed);
    }

    #[test]
    fn a_refusal_names_kernels_errors_bound_and_compiler() {
        let compiler = "nvcc 13.0.88";
        let rows = [row(Choice::Native, 1.25), row(Choice::Portable, 0.005)];
        let line = refusal(&rows, compiler).unwrap();
        for part in ["global attention hd64", "bf16", "5x64 dk 1.2e0 > 7.8e-3", compiler] {
            assert!(line.contains(part), "{line}");
        }
        assert!(line.ends_with("the portable kernels take its place"), "{line}");
        assert!(!line.contains("out") && !line.contains('\n'), "{line}");
        let rows = [row(Choice::Native, 1.25), row(Choice::Portable, 2.5)];
        let line = refusal(&rows, compiler).unwrap();
        assert!(line.contains("portable kernels: 5x64 dk 2.5e0"), "{line}");
        assert!(line.ends_with("the composed graph takes its place"), "{line}");
        assert_eq!(refusal(&[row(Choice::Native, 0.005)], compiler), None);
    }

    #[test]
    fn a_refusal_is_one_line_of_the_worst_results() {
        let mut wrong = row(Choice::Native, 0.5);
        for (name, error) in [("dq", 0.7), ("dv", 0.6), ("drel_h", 0.4), ("drel_w", 0.3)] {
            let result = name.to_string();
            wrong.comparisons.push(Comparison { result, error, bound: 0.1 });
        }
        let line = refusal(&[wrong], "nvcc").unwrap();
        let worst = "5x64 dk 5.0e-1 > 7.8e-3, dq 7.0e-1 > 1.0e-1, dv 6.0e-1 > 1.0e-1 and 2 more";
        assert!(line.contains(worst), "{line}");

        let failure = Some("no kernel\n\nCaused by:\n    no image".to_string());
        let failed = SelfTestRow { comparisons: vec![], failure, ..row(Choice::Native, 0.0) };
        let line = refusal(&[failed], "nvcc").unwrap();
        assert!(line.contains("native kernels: no kernel Caused by: no image (kernels"), "{line}");
    }

    #[test]
    fn the_table_shows_the_worst_result_of_each_row() {
        let failed = SelfTestRow {
            comparisons: vec![],
            failure: Some("no image".into()),
            ..row(Choice::Native, 0.0)
        };
        let rows = vec![row(Choice::Native, 1.25), row(Choice::Portable, 0.001), failed];
        let report = SelfTestReport { device: "GPU".into(), compiler: "nvcc 13.0.88", rows };
        let table = report.to_string();
        let lines: Vec<_> = table.lines().collect();
        assert_eq!(lines[0], "GPU, kernels compiled by nvcc 13.0.88");
        let columns = |line: &str| line.split_whitespace().map(str::to_string).collect::<Vec<_>>();
        let global = |rest: &str| columns(&format!("global attention hd64 bf16 {rest}"));
        assert_eq!(columns(lines[2]), global("native 5x64 dk 1.2e0 7.8e-3 refused"));
        assert_eq!(columns(lines[3]), global("portable 5x64 out 2.0e-3 7.8e-3 ok"));
        assert_eq!(columns(lines[4]), global("native - - - refused"));
        assert_eq!(lines[5], "global attention hd64 bf16: no image");
        assert!(!report.passed());
    }
}
