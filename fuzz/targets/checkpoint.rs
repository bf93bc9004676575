//! Sharded checkpoints of well-formed files: any index, any of the names SAM's tensors have or nearly have.
#![no_main]

use arbitrary::Arbitrary;
use candle_core::{DType, Device, Tensor};
use candle_sam_lora::{sam::checkpoint, write_tensors};
use candle_sam_lora_fuzz::{bits, file, folder, Small};
use std::collections::BTreeMap;

const NAMES: [&str; 12] = [
    "vision_encoder.layers.0.attn.q.weight",
    "vision_encoder.layers.0.attn.qkv.weight",
    "image_encoder.blocks.0.attn.qkv.weight",
    "layers.0.attn.q.weight",
    "layers.0.attn.q.bias",
    "layers.0.attn.qkv.weight",
    "layers.0.attn.qkv.bias",
    "neck.layer_norm1.weight",
    "neck.layer_norm1.bias",
    "shared_image_embedding.positional_embedding",
    "prompt_encoder.shared_embedding.positional_embedding",
    "image_encoder.patch_embed.proj.weight",
];

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    shards: [Vec<Entry<'a>>; 2],
    index: Vec<(Name<'a>, File<'a>)>,
    /// Whether the index is the JSON of `index`, or any text.
    text: Option<&'a str>,
}

#[derive(Arbitrary, Debug)]
struct Entry<'a> {
    name: Name<'a>,
    dtype: u8,
    shape: [u8; 2],
    rank: u8,
    value: f32,
}

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Known { prefix: Option<&'a str>, index: u8 },
    Any(&'a str),
}

#[derive(Arbitrary, Debug)]
enum File<'a> {
    First,
    Second,
    Any(&'a str),
}

impl Name<'_> {
    fn text(&self) -> String {
        match self {
            Self::Known { prefix, index } => {
                format!("{}{}", prefix.unwrap_or_default(), NAMES[*index as usize % NAMES.len()])
            }
            Self::Any(name) => name.to_string(),
        }
    }
}

fn tensor(entry: &Entry) -> Tensor {
    let dtypes = [DType::F32, DType::F16, DType::BF16, DType::F64, DType::U8, DType::I64];
    let shape: Vec<usize> =
        entry.shape.iter().take(entry.rank as usize % 3).map(|d| *d as usize % 7).collect();
    let full = Tensor::full(entry.value, shape, &Device::Cpu).unwrap();
    full.to_dtype(dtypes[entry.dtype as usize % dtypes.len()]).unwrap()
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    const SHARDS: [&str; 2] = ["a.safetensors", "b.safetensors"];
    for (name, entries) in SHARDS.iter().zip(&input.shards) {
        let tensors: BTreeMap<String, Tensor> =
            entries.iter().map(|entry| (entry.name.text(), tensor(entry))).collect();
        // The format's own name for the strings beside the tensors.
        if tensors.contains_key("__metadata__") {
            return;
        }
        write_tensors(&folder().join(name), &tensors).unwrap();
    }
    let map: BTreeMap<String, String> = (input.index.iter())
        .map(|(name, file)| {
            let file = match file {
                File::First => SHARDS[0],
                File::Second => SHARDS[1],
                File::Any(name) => name,
            };
            (name.text(), file.to_string())
        })
        .collect();
    let json = serde_json::json!({ "weight_map": map }).to_string();
    let index = file("model.safetensors.index.json", input.text.unwrap_or(&json).as_bytes());
    for path in [folder().to_path_buf(), index, folder().join(SHARDS[0])] {
        let mut model = Small::new();
        let before = bits(&model);
        if checkpoint::load(&mut model, &path).is_err() {
            assert_eq!(bits(&model), before);
        } else {
            assert!(bits(&model).iter().all(|bits| f32::from_bits(*bits).is_finite()));
        }
    }
});
