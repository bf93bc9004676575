//! Any bytes as each of the JSON files a model's folder may hold.
#![no_main]

use candle_sam_lora::lora::{inject, LoraConfig};
use candle_sam_lora::sam::{SamConfig, SamProcessor};
use candle_sam_lora_fuzz::{file, folder, Small};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Ok(config) = SamConfig::load(file("config.json", bytes)) {
        // An accepted configuration is written and read back as it was.
        let again = file("again.json", config.to_json().unwrap().as_bytes());
        let again = SamConfig::load(again).unwrap();
        assert_eq!(again.vision_config.mlp_dim(), config.vision_config.mlp_dim());
        assert_eq!(again.prompt_encoder_config, config.prompt_encoder_config);
        assert_eq!(again.mask_decoder_config, config.mask_decoder_config);
    }
    file("preprocessor_config.json", bytes);
    let _ = SamProcessor::load(folder(), 1024);
    if let Ok(config) = LoraConfig::load(&file("adapter_config.json", bytes)) {
        let again = file("again.json", config.to_json().unwrap().as_bytes());
        let again = LoraConfig::load(&again).unwrap();
        assert_eq!(again.rank_pattern, config.rank_pattern);
        assert_eq!(again.target_modules, config.target_modules);
        // Ranks up to the limit are real allocations, which are not the point here.
        let small = |rank: &usize| *rank <= 64;
        if small(&config.rank) && config.rank_pattern.values().all(small) {
            let _ = inject(&mut Small::new(), &config, 0);
        }
    }
});
