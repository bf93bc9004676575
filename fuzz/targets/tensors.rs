//! Any bytes as a safetensors file: read as tensors, and loaded into a model.
#![no_main]

use candle_core::Device;
use candle_sam_lora::{read_tensors, sam::checkpoint};
use candle_sam_lora_fuzz::{bits, file, Small};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let path = file("model.safetensors", bytes);
    if let Ok(tensors) = read_tensors(&path, &Device::Cpu) {
        let size: usize =
            tensors.values().map(|t| t.elem_count() * t.dtype().size_in_bytes()).sum();
        // U16 is widened to u32, no other dtype grows.
        assert!(size <= 2 * bytes.len());
    }
    let mut model = Small::new();
    let before = bits(&model);
    if let Err(error) = checkpoint::load(&mut model, &path) {
        assert!(error.to_string().contains("model.safetensors"), "{error}");
        assert_eq!(bits(&model), before);
    }
});
