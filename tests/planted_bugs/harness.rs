//! Plants a bug in a copy of the kernels, runs the copy in every mode, and compares the outcomes with the bug's row.

use crate::common;
use crate::device::{cache, kernels, Device};
use crate::sanitizer::Sanitizer;
use candle_core::Result;
use candle_sam_lora_emulator::{Emulator, Mode, Sources, Timing};
use libtest_mimic::{Failed, Trial};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// The error of each output, infinite where the output has NaN; or the report.
pub type Outcomes = Vec<Result<f64>>;

/// A program that runs kernels.
#[derive(Clone, Copy)]
pub struct Subject {
    /// Opens the names of its tests.
    pub name: &'static str,
    pub source: Source,
    pub modes: fn() -> Vec<Mode>,
    pub run: fn(&Device) -> Outcomes,
    /// A right output has at most this error.
    pub right_up_to: f64,
    /// A wrong output has a larger error.
    pub wrong_above: f64,
}

/// The file that is compiled against a copy of the kernels' headers.
#[derive(Clone, Copy)]
pub enum Source {
    /// This text, which instantiates templates of the headers.
    Instances(&'static str),
    /// A file below `tests/kernels`.
    File(&'static str),
}

impl Source {
    fn file_name(self) -> &'static str {
        match self {
            Source::Instances(_) => "instances.cu",
            Source::File(path) => path.rsplit('/').next().unwrap_or(path),
        }
    }
}

/// A row of a table: the bug, and the checks that must see it.
pub struct Bug {
    pub name: &'static str,
    /// A path below `kernels`, or the name of the subject's own file.
    pub file: &'static str,
    /// Stands once in the file; white space is ignored, so line breaks may move.
    pub old: &'static str,
    pub new: &'static str,
    pub seen: &'static [Seen],
}

/// The kernels as they are, right in every mode.
pub const UNHARMED: Bug =
    Bug { name: "unharmed", file: "", old: "", new: "", seen: &[right(always)] };

/// A check: what an outcome must be, in which modes, for which outputs.
#[derive(Clone, Copy)]
pub struct Seen {
    what: What,
    when: fn(&Mode) -> bool,
    /// Empty: all outputs.
    outputs: &'static [usize],
    /// None: in all those modes.
    at_least: Option<usize>,
}

#[derive(Clone, Copy, Debug)]
enum What {
    Right,
    /// An output without a report, right or wrong.
    Computed,
    Wrong,
    NotANumber,
    /// Wrong or reported.
    Caught,
    Reported {
        words: &'static [&'static str],
        line_of: Option<&'static str>,
    },
    Sanitized(&'static Sanitizer),
}

const fn seen(what: What, when: fn(&Mode) -> bool) -> Seen {
    Seen { what, when, outputs: &[], at_least: None }
}

/// The output is right in these modes.
pub const fn right(when: fn(&Mode) -> bool) -> Seen {
    seen(What::Right, when)
}

/// There is an output in these modes, and no report.
pub const fn computed(when: fn(&Mode) -> bool) -> Seen {
    seen(What::Computed, when)
}

/// The output is wrong in these modes.
pub const fn wrong(when: fn(&Mode) -> bool) -> Seen {
    seen(What::Wrong, when)
}

/// The output has NaN in these modes.
pub const fn not_a_number(when: fn(&Mode) -> bool) -> Seen {
    seen(What::NotANumber, when)
}

/// The output is wrong in these modes, or there is a report.
pub const fn caught(when: fn(&Mode) -> bool) -> Seen {
    seen(What::Caught, when)
}

/// A report holds these words, in every mode.
pub const fn reported(words: &'static [&'static str]) -> Seen {
    seen(What::Reported { words, line_of: None }, always)
}

/// A sanitizer ends the process with a report.
pub const fn sanitized(by: &'static Sanitizer) -> Seen {
    seen(What::Sanitized(by), always)
}

impl Seen {
    /// In these modes.
    pub const fn when(self, when: fn(&Mode) -> bool) -> Self {
        Self { when, ..self }
    }

    /// For these outputs.
    pub const fn of(self, outputs: &'static [usize]) -> Self {
        Self { outputs, ..self }
    }

    /// In so many of the modes: the order of the threads decides.
    pub const fn at_least(self, count: usize) -> Self {
        Self { at_least: Some(count), ..self }
    }

    /// The report names the line of this text in the subject's own file.
    pub const fn at_line_of(self, text: &'static str) -> Self {
        match self.what {
            What::Reported { words, .. } => {
                Self { what: What::Reported { words, line_of: Some(text) }, ..self }
            }
            _ => panic!("not a report"),
        }
    }
}

pub fn always(_: &Mode) -> bool {
    true
}

/// Copies land late.
pub fn late(mode: &Mode) -> bool {
    mode.timing == Timing::Late
}

/// Copies land early.
pub fn early(mode: &Mode) -> bool {
    mode.timing == Timing::Early
}

/// Copies land early, and threads run in no fixed order.
pub fn early_unordered(mode: &Mode) -> bool {
    early(mode) && mode.seed != 0
}

/// Copies land early and products are formed late: a stage given back too soon is overwritten.
pub fn early_before_products(mode: &Mode) -> bool {
    early(mode) && late_products(mode)
}

pub fn late_products(mode: &Mode) -> bool {
    mode.products == Timing::Late
}

/// A launch may begin before the launch in front of it has ended.
pub fn early_dependents(mode: &Mode) -> bool {
    mode.dependents == Timing::Early
}

pub fn late_dependents(mode: &Mode) -> bool {
    !early_dependents(mode)
}

pub fn timings() -> Vec<Mode> {
    Mode::all().collect()
}

pub fn timings_and_products() -> Vec<Mode> {
    Mode::all_with_products().collect()
}

/// The error relative to the largest magnitude expected, infinite where a result is not finite.
pub fn error(got: &[f64], expected: &[f64]) -> f64 {
    match got.iter().all(|x| x.is_finite()) {
        true => common::error(got, expected),
        false => f64::INFINITY,
    }
}

/// The bytes of a params struct of words, behind `maps` tensor maps.
pub fn params(maps: usize, words: &[u64]) -> Vec<u8> {
    let words = words.iter().flat_map(|word| word.to_ne_bytes());
    std::iter::repeat_n(0, 128 * maps).chain(words).collect()
}

/// Two words of 32 bits.
pub fn pair(low: usize, high: usize) -> u64 {
    low as u64 | (high as u64) << 32
}

type Tried<T> = std::result::Result<T, Failed>;

impl Subject {
    /// The test of one row.
    pub fn trial(self, bug: &'static Bug) -> Trial {
        let name = format!("{}: {}", self.name, bug.name);
        Trial::test(name.clone(), move || match bug.seen {
            [Seen { what: What::Sanitized(sanitizer), .. }] => {
                let run = || self.outcomes(&self.plant(&name, bug)?).map(|_| ());
                sanitizer.check(&name, bug.file, run)
            }
            _ => self.check(&self.plant(&name, bug)?, bug),
        })
    }

    /// The emulator of unharmed kernels, from a folder of this name.
    pub fn unharmed(&self, name: &str) -> Tried<Emulator> {
        self.emulator(&self.plant(name, &UNHARMED)?)
    }

    fn check(&self, folder: &Path, bug: &Bug) -> Tried<()> {
        let outcomes = self.outcomes(folder)?;
        for seen in bug.seen {
            let line = match seen.what {
                What::Reported { line_of: Some(text), .. } => self.line_of(folder, text)?,
                _ => String::new(),
            };
            for output in (0..outcomes[0].1.len())
                .filter(|output| seen.outputs.is_empty() || seen.outputs.contains(output))
            {
                let modes: Vec<_> = outcomes.iter().filter(|(mode, _)| (seen.when)(mode)).collect();
                let shows = |(_, all): &&&(_, Vec<_>)| self.shows(&all[output], seen.what, &line);
                let count = modes.iter().filter(shows).count();
                if modes.is_empty() || count < seen.at_least.unwrap_or(modes.len()) {
                    let lines = outcomes.iter().map(|(mode, all)| format!("\n{mode:?}: {all:?}"));
                    let (lines, of) = (lines.collect::<String>(), modes.len());
                    let what = seen.what;
                    return Err(format!(
                        "output {output}: {what:?} in {count} of {of} modes{lines}"
                    )
                    .into());
                }
            }
        }
        Ok(())
    }

    fn shows(&self, outcome: &Result<f64>, what: What, line: &str) -> bool {
        match (what, outcome) {
            (What::Computed, Ok(_)) | (What::Caught, Err(_)) => true,
            (What::Right, Ok(error)) => *error <= self.right_up_to,
            (What::Wrong | What::Caught, Ok(error)) => *error > self.wrong_above,
            (What::NotANumber, Ok(error)) => error.is_infinite(),
            (What::Reported { words, .. }, Err(report)) => {
                let report = report.to_string();
                words.iter().chain([&line]).all(|word| report.contains(word))
            }
            _ => false,
        }
    }

    /// A folder of this name with the headers and the subject's file, where the bug is planted.
    fn plant(&self, name: &str, bug: &Bug) -> Tried<PathBuf> {
        let root = Path::new(env!("CARGO_TARGET_TMPDIR")).join("planted_bugs");
        let folder = root.join(name.replace(|c: char| !c.is_ascii_alphanumeric(), "_"));
        copy_headers(&kernels(), &folder)?;
        let text = match self.source {
            Source::Instances(text) => text.to_string(),
            Source::File(path) => {
                let tests = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels");
                std::fs::read_to_string(tests.join(path))?
            }
        };
        std::fs::write(folder.join(self.source.file_name()), text)?;
        if !bug.file.is_empty() {
            let file = folder.join(bug.file);
            let text = std::fs::read_to_string(&file)?;
            let Range { start, end } = only_place(&text, bug.old)
                .map_err(|count| format!("{} holds {count} times: {}", bug.file, bug.old))?;
            std::fs::write(file, [&text[..start], bug.new, &text[end..]].concat())?;
        }
        Ok(folder)
    }

    fn emulator(&self, folder: &Path) -> Tried<Emulator> {
        let sources = Sources::files(folder, vec![folder.join(self.source.file_name())]);
        Ok(Emulator::new(&sources, &cache())?)
    }

    /// The outcome of each output in each mode.
    fn outcomes(&self, folder: &Path) -> Tried<Vec<(Mode, Outcomes)>> {
        let emulator = self.emulator(folder)?;
        let outcome = |mode| (mode, (self.run)(&Device { emulator: &emulator, mode }));
        Ok((self.modes)().into_iter().map(outcome).collect())
    }

    /// The line on which `text` begins, as reports give it.
    fn line_of(&self, folder: &Path, text: &str) -> Tried<String> {
        let name = self.source.file_name();
        let source = std::fs::read_to_string(folder.join(name))?;
        let place = only_place(&source, text)
            .map_err(|count| format!("{name} holds {count} times: {text}"))?;
        Ok(format!("{name}:{}", source[..place.start].matches('\n').count() + 1))
    }
}

/// The only place of `wanted` in `text`, or the number of places. White space is ignored in both.
fn only_place(text: &str, wanted: &str) -> std::result::Result<Range<usize>, usize> {
    let solid = |text: &str| -> Vec<(usize, char)> {
        text.char_indices().filter(|(_, c)| !c.is_whitespace()).collect()
    };
    let (text, wanted) = (solid(text), solid(wanted));
    let is_wanted = |window: &&[(usize, char)]| window.iter().zip(&wanted).all(|(a, b)| a.1 == b.1);
    let places: Vec<_> = text.windows(wanted.len()).filter(is_wanted).collect();
    match places[..] {
        [[(start, _), .., (last, c)]] => Ok(*start..last + c.len_utf8()),
        _ => Err(places.len()),
    }
}

/// Copies the headers of a folder and of its sub-folders.
fn copy_headers(from: &Path, to: &Path) -> std::io::Result<()> {
    std::fs::create_dir_all(to)?;
    for entry in std::fs::read_dir(from)? {
        let path = entry?.path();
        let copy = to.join(path.file_name().unwrap_or_default());
        if path.is_dir() {
            copy_headers(&path, &copy)?;
        } else if path.extension().is_some_and(|e| e == "cuh" || e == "h") {
            std::fs::copy(path, copy)?;
        }
    }
    Ok(())
}
