//! The image processor of a model.

use super::console;
use candle_sam_lora::sam::{SamConfig, SamProcessor};
use candle_sam_lora::Result;
use std::path::Path;

/// The image processor beside a model's weights. Where there is none, that is said.
pub fn load(path: &Path, config: &SamConfig) -> Result<SamProcessor> {
    let size = config.vision_config.image_size;
    let missing = |folder: &Path| {
        console::say(format!(
            "{}: neither processor_config.json nor preprocessor_config.json is there; images are processed as SAM's are",
            folder.display()
        ));
    };
    let folder = if path.is_file() { path.parent().unwrap_or(path) } else { path };
    // Beside a single file it counts if the configuration there is this model's.
    let is_own = || SamConfig::load(folder.join("config.json")).is_ok_and(|own| own == *config);
    if path.is_file() && !is_own() {
        missing(folder);
        return Ok(SamProcessor::new(size));
    }
    let processor = SamProcessor::load(folder, size)?;
    if SamProcessor::config_file(folder)?.is_none() {
        missing(folder);
    }
    Ok(processor)
}
