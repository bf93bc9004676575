//! Files of torch.save: any bytes as a file, and any pickle over well-formed storages in a well-formed archive.
#![no_main]

use arbitrary::Arbitrary;
use candle_sam_lora::nn::checkpoint::{load, Names};
use candle_sam_lora_fuzz::{bits, file, Small};

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    /// Whether the bytes are the whole file or its pickle.
    whole: bool,
    storages: [&'a [u8]; 2],
    order: bool,
    bytes: &'a [u8],
}

/// A zip archive of stored entries, as torch.save writes it.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, bytes) in entries {
        let start = file.len() as u32;
        let mut common = [20u16, 0, 0, 0, 0].map(u16::to_le_bytes).concat();
        common.extend([0, bytes.len() as u32, bytes.len() as u32].map(u32::to_le_bytes).concat());
        common.extend([name.len() as u16, 0].map(u16::to_le_bytes).concat());
        file.extend([b"PK\x03\x04", &common[..], name.as_bytes(), bytes].concat());
        directory.extend([b"PK\x01\x02\x14\x00", &common[..]].concat());
        directory.extend([0u16, 0, 0].map(u16::to_le_bytes).concat());
        directory.extend([0u32, start].map(u32::to_le_bytes).concat());
        directory.extend(name.as_bytes());
    }
    let start = file.len() as u32;
    file.extend(&directory);
    file.extend(b"PK\x05\x06");
    let count = entries.len() as u16;
    file.extend([0, 0, count, count].map(u16::to_le_bytes).concat());
    file.extend([directory.len() as u32, start].map(u32::to_le_bytes).concat());
    file.extend(0u16.to_le_bytes());
    file
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    let bytes = match input.whole {
        true => input.bytes.to_vec(),
        false => archive(&[
            ("a/data.pkl", input.bytes),
            ("a/byteorder", if input.order { b"big" } else { b"little" }),
            ("a/data/0", input.storages[0]),
            ("a/data/1", input.storages[1]),
        ]),
    };
    let path = file("model.pth", &bytes);
    let mut model = Small::new();
    let before = bits(&model);
    match load(&mut model, &path, &Names::PLAIN) {
        Err(error) => {
            assert!(error.to_string().contains("model.pth"), "{error}");
            assert_eq!(bits(&model), before);
        }
        Ok(_) => assert!(bits(&model).iter().all(|bits| f32::from_bits(*bits).is_finite())),
    }
});
