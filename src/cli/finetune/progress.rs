//! How far an evaluation is: a bar on a terminal, a line now and then elsewhere.

use super::super::console::Console;
use indicatif::ProgressBar;
use std::cell::Cell;
use std::time::{Duration, Instant};

/// No line comes sooner after another.
const PATIENCE: Duration = Duration::from_secs(10);

/// The progress through images and their objects.
pub struct Progress {
    console: Console,
    bar: ProgressBar,
    images: usize,
    said: Cell<Instant>,
}

impl Progress {
    /// Begins with `images` images.
    pub fn new(images: usize, console: Console) -> Self {
        let bar = console.bar(images as u64, "images evaluated{msg}");
        bar.tick();
        Self { console, bar, images, said: Cell::new(Instant::now()) }
    }

    /// So many of an image's objects are done; images count from 0.
    pub fn at(&self, image: usize, done: usize, objects: usize) {
        self.bar.set_position(image as u64);
        self.bar.set_message(format!("  {done} of {objects} objects"));
        if self.bar.is_hidden() && self.said.get().elapsed() >= PATIENCE {
            self.said.set(Instant::now());
            self.console.note(format!(
                "evaluating image {} of {}: {done} of {objects} objects",
                image + 1,
                self.images
            ));
        }
    }

    /// Takes the bar away.
    pub fn end(&self) {
        self.bar.finish_and_clear();
    }
}
