//! The images of a run: those to train on, and those held out.

use super::super::listed::listed;
use super::options::Options;
use crate::train::{together, Communicator, DataFiles, Dataset, TruthFiles};
use crate::Result;
use std::path::{Path, PathBuf};

/// The images to train on and those held out; each process reads its share.
pub fn datasets(
    options: &Options,
    processes: &dyn Communicator,
) -> anyhow::Result<(Dataset, Dataset)> {
    let open = |part: &str, images: &[PathBuf], truth: TruthFiles| -> anyhow::Result<Dataset> {
        let files = DataFiles { images: images.to_vec(), truth };
        let dataset = Dataset::open_together(&files, &options.data(), processes)?;
        let lines = dataset.summary().lines();
        lines.iter().for_each(|line| options.console.note(format!("{part}{line}")));
        Ok(dataset)
    };
    let places = || -> Result<_> {
        let Options { images, masks, coco, .. } = options;
        let Options { val_images, val_masks, val_coco, .. } = options;
        Ok([files(images, masks, coco)?, files(val_images, val_masks, val_coco)?])
    };
    let ([all, held_out], _) = together(processes, places(), |_| vec![])?;
    let Some((images, truth)) = all else {
        let nuclei = Path::new(env!("CARGO_MANIFEST_DIR")).join("assets/photos/nuclei");
        let part = |said: &str, part: &str| {
            let folder = |kind: &str| nuclei.join(part).join(kind);
            open(said, &[folder("images")], TruthFiles::Masks(vec![folder("masks")]))
        };
        return Ok((part("", "train")?, part("held out: ", "heldout")?));
    };
    let all = open("", &images, truth)?;
    match held_out {
        Some((images, truth)) => Ok((all, open("held out: ", &images, truth)?)),
        None => Ok(all.split(options.val_fraction, options.seed)?),
    }
}

/// The places of images and of their truth, if they were named.
fn files(
    images: &[PathBuf],
    masks: &[PathBuf],
    coco: &Option<PathBuf>,
) -> Result<Option<(Vec<PathBuf>, TruthFiles)>> {
    let truth = match coco {
        Some(coco) => TruthFiles::Coco(coco.clone()),
        None if masks.is_empty() => TruthFiles::Beside,
        None => TruthFiles::Masks(listed(masks)?),
    };
    Ok(if images.is_empty() { None } else { Some((listed(images)?, truth)) })
}
