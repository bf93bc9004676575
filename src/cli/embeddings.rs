//! Image embeddings that are kept in files.

use super::console::Console;
use super::photo::PhotoArguments;
use crate::sam::{Embedded, EmbeddingStore, SamPredictor};
use crate::Result;
use std::path::{Path, PathBuf};

/// Where embeddings are kept
#[derive(clap::Args, Clone, Debug)]
pub struct EmbeddingArguments {
    /// Keep image embeddings in this folder, or `beside` the images; one that is there is read if image, model and adapter
    /// agree
    #[arg(long, value_name = "DIR|beside")]
    embeddings: Option<PathBuf>,
}

/// The embeddings of a run.
pub struct Embeddings {
    store: Option<EmbeddingStore>,
    read: usize,
    computed: usize,
    /// The first image that was embedded, and why.
    first: Option<String>,
}

impl EmbeddingArguments {
    /// The place that is named, for images read as `photo` says.
    pub fn open(&self, photo: &PhotoArguments) -> Embeddings {
        let store = self.embeddings.as_ref().map(|place| match place.to_str() {
            Some("beside") => EmbeddingStore::beside(),
            _ => EmbeddingStore::in_folder(place),
        });
        let store = store.map(|store| store.with_options(photo.options()));
        Embeddings { store, read: 0, computed: 0, first: None }
    }
}

impl Embeddings {
    /// The embedding of an image file; none where embeddings are not kept.
    pub fn get(&mut self, predictor: &SamPredictor<'_>, image: &Path) -> Result<Option<Embedded>> {
        let Some(store) = &self.store else { return Ok(None) };
        let found = store.get_or_embed(predictor, image)?;
        match &found.computed {
            None => self.read += 1,
            Some(why) => {
                self.computed += 1;
                self.first.get_or_insert_with(|| format!(" ({}: {why})", image.display()));
            }
        }
        Ok(Some(found))
    }

    /// Says how many were read and how many computed, and why the first one was.
    pub fn tell(&self, console: Console) {
        let Self { store, read, computed, first } = self;
        if store.is_some() {
            let first = first.as_deref().unwrap_or_default();
            console.note(format!("embeddings: {read} read, {computed} computed{first}"));
        }
    }
}
