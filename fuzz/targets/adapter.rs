//! Any two byte strings as the two files of an adapter folder: the configuration up to the first zero byte, the
//! tensors after it.
#![no_main]

use candle_sam_lora::lora::{load_adapter, save_adapter, CONFIG_FILE, TENSORS_FILE};
use candle_sam_lora_fuzz::{bits, file, folder, Small};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    let split = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
    let (config, tensors) = bytes.split_at(split);
    file(CONFIG_FILE, config);
    file(TENSORS_FILE, tensors.get(1..).unwrap_or_default());
    let mut model = Small::new();
    let before = bits(&model);
    match load_adapter(&mut model, folder()) {
        Err(_) => assert_eq!(bits(&model), before),
        Ok(config) => {
            // A loaded adapter is saved and loads again, to the same bits.
            let loaded = bits(&model);
            save_adapter(&model, &config, folder()).unwrap();
            let mut again = Small::new();
            load_adapter(&mut again, folder()).unwrap();
            assert_eq!(bits(&again), loaded);
        }
    }
});
