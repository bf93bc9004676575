//! Any bytes as an image and as a mask.
#![no_main]

use candle_core::Device;
use candle_sam_lora::sam::{read_image, SamProcessor};
use candle_sam_lora::train::{find_instances, read_mask, MaskOptions, Meaning};
use candle_sam_lora_fuzz::file;

libfuzzer_sys::fuzz_target!(init: caught_panics_are_fine(), |bytes: &[u8]| {
    let path = file("image", bytes);
    // Large images are slow to fuzz and no different.
    const MOST: u32 = 512;
    let small = |path: &std::path::Path| {
        let reader = image_size(path);
        reader.is_none_or(|(width, height)| width.max(height) <= MOST)
    };
    if !small(&path) {
        return;
    }
    if let Ok(image) = read_image(&path) {
        let _ = SamProcessor::new(16).preprocess(&image, &Device::Cpu);
    }
    if let Ok(mask) = read_mask(&path, &MaskOptions::default()) {
        let found = find_instances(&mask.labels, 1);
        assert_eq!(found.is_empty(), mask.meaning == Meaning::Empty);
        let area: usize = found.iter().map(|instance| instance.area).sum();
        assert!(area <= mask.labels.len());
    }
});

/// libFuzzer's hook aborts at every panic. Those of a decoder are for `read_image` to catch; any other still ends the
/// target, which catches it too.
fn caught_panics_are_fine() {
    std::panic::set_hook(Box::new(|panic| {
        if !panic.location().is_some_and(|place| place.file().contains("/registry/")) {
            eprintln!("{panic}");
        }
    }));
}

/// Width and height as the header claims them.
fn image_size(path: &std::path::Path) -> Option<(u32, u32)> {
    image::ImageReader::open(path).ok()?.with_guessed_format().ok()?.into_dimensions().ok()
}
