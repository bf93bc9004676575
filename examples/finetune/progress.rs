//! How far an evaluation is: a bar on a terminal, a line now and then elsewhere.

use super::console::say;
use indicatif::{ProgressBar, ProgressStyle};
use std::cell::Cell;
use std::time::{Duration, Instant};

/// Nothing is shown before, and no line sooner after another.
const PATIENCE: Duration = Duration::from_secs(10);
/// The bar appears for so many objects.
const MANY: usize = 50;

/// The progress through the objects of an image.
pub struct Progress {
    what: String,
    count: usize,
    bar: ProgressBar,
    said: Cell<Instant>,
}

impl Progress {
    /// Begins with `count` objects.
    pub fn new(what: String, count: usize) -> Self {
        let bar = match count < MANY {
            true => ProgressBar::hidden(),
            false => ProgressBar::new(count as u64).with_message(what.clone()),
        };
        if let Ok(style) = ProgressStyle::with_template("{bar:40} {pos}/{len} objects  {msg}") {
            bar.set_style(style);
        }
        Self { what, count, bar, said: Cell::new(Instant::now()) }
    }

    /// So many are done.
    pub fn at(&self, done: usize) {
        self.bar.set_position(done as u64);
        if self.bar.is_hidden() && self.said.get().elapsed() >= PATIENCE {
            self.said.set(Instant::now());
            say(format!("{}: {done} of {} objects", self.what, self.count));
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
