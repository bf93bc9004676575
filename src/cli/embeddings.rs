//! Image embeddings that are kept in files.

use super::console::Console;
use super::photo::PhotoArguments;
use crate::sam::{Embedded, EmbeddingStore, SamPredictor};
use crate::Result;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Where embeddings are kept
#[derive(clap::Args, Clone, Debug)]
pub struct EmbeddingArguments {
    /// Keep image embeddings in this folder, or `beside` the images; one that is there is read if image, model and
    /// adapter agree
    #[arg(long, value_name = "DIR|beside")]
    embeddings: Option<PathBuf>,
}

/// The embeddings of a run.
pub struct Embeddings {
    store: Option<EmbeddingStore>,
}

/// Where the embedding of an image came from.
#[derive(Debug, Serialize, Deserialize)]
pub enum Origin {
    /// Embeddings are not kept.
    Unkept,
    /// A file.
    Read,
    /// The model, and why.
    Computed(String),
}

/// Counts of the images of a run by the origins of their embeddings.
#[derive(Debug, Default)]
pub struct Tally {
    read: usize,
    computed: usize,
    /// The first image that was embedded, and why.
    first: Option<(usize, String)>,
}

impl EmbeddingArguments {
    /// The place that is named, for images read as `photo` says.
    pub fn open(&self, photo: &PhotoArguments) -> Embeddings {
        let store = self.embeddings.as_ref().map(|place| match place.to_str() {
            Some("beside") => EmbeddingStore::beside(),
            _ => EmbeddingStore::in_folder(place),
        });
        Embeddings { store: store.map(|store| store.with_options(photo.options())) }
    }

    /// Whether embeddings are kept.
    pub fn is_given(&self) -> bool {
        self.embeddings.is_some()
    }

    /// The folder that is named.
    pub fn folder(&self) -> Option<&Path> {
        self.embeddings.as_deref().filter(|place| *place != Path::new("beside"))
    }
}

impl Embeddings {
    /// The embedding of an image file; none where embeddings are not kept.
    pub fn get(&self, predictor: &SamPredictor<'_>, image: &Path) -> Result<Option<Embedded>> {
        self.store.as_ref().map(|store| store.get_or_embed(predictor, image)).transpose()
    }

    /// Says how many were read and how many computed, and why the first one was.
    pub fn tell(&self, Tally { read, computed, first }: &Tally, console: Console) {
        if self.store.is_some() {
            let first = first.as_ref().map_or("", |(_, first)| first);
            console.note(format!("embeddings: {read} read, {computed} computed{first}"));
        }
    }
}

impl Origin {
    /// That of an embedding, if it is kept.
    pub fn of(found: Option<&Embedded>) -> Self {
        match found.map(|found| &found.computed) {
            None => Self::Unkept,
            Some(None) => Self::Read,
            Some(Some(why)) => Self::Computed(why.clone()),
        }
    }
}

impl Tally {
    /// Counts the image of a number, in any order.
    pub fn add(&mut self, number: usize, image: &Path, origin: Origin) {
        match origin {
            Origin::Unkept => {}
            Origin::Read => self.read += 1,
            Origin::Computed(why) => {
                self.computed += 1;
                if self.first.as_ref().is_none_or(|(first, _)| number < *first) {
                    self.first = Some((number, format!(" ({}: {why})", image.display())));
                }
            }
        }
    }
}
