//! The image processor of a model.

use super::console;
use candle_sam_lora::sam::{SamConfig, SamProcessor};
use candle_sam_lora::Result;
use std::path::Path;

/// The image processor in a model's folder. A folder without one is said so.
pub fn load(folder: &Path, config: &SamConfig) -> Result<SamProcessor> {
    let processor = SamProcessor::load(folder, config.vision_config.image_size)?;
    if SamProcessor::config_file(folder)?.is_none() {
        console::say(format!(
            "{}: neither processor_config.json nor preprocessor_config.json is there; images are processed as SAM's are",
            folder.display()
        ));
    }
    Ok(processor)
}
