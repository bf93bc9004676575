//! The state of a run: any bytes, and well-formed states of any content, which get past the checksum.
#![no_main]

use arbitrary::Arbitrary;
use candle_core::{Device, Tensor};
use candle_sam_lora::nn::set_trainable;
use candle_sam_lora::train::{AdamWConfig, TrainingState, Trainer, TrainerConfig};
use candle_sam_lora_fuzz::{bits, file, folder, Small};
use std::path::Path;

#[derive(Arbitrary, Debug)]
struct Input<'a> {
    step: u8,
    losses: Vec<f32>,
    tensors: Vec<(Name<'a>, [u8; 2], u8, f32)>,
    bytes: &'a [u8],
}

#[derive(Arbitrary, Debug)]
enum Name<'a> {
    Known { moment: u8, parameter: u8 },
    Any(&'a str),
}

impl Name<'_> {
    fn text(&self) -> String {
        const KINDS: [&str; 4] = ["parameter.", "exp_avg.", "exp_avg_sq.", ""];
        const PARAMETERS: [&str; 4] = [
            "layers.0.attn.q.weight",
            "layers.0.attn.q.bias",
            "neck.layer_norm1.weight",
            "neck.layer_norm1.bias",
        ];
        match self {
            Self::Known { moment, parameter } => {
                format!("{}{}", KINDS[*moment as usize % 4], PARAMETERS[*parameter as usize % 4])
            }
            Self::Any(name) => name.to_string(),
        }
    }
}

fn resume(path: &Path) {
    let mut model = Small::new();
    set_trainable(&mut model, |_| true).unwrap();
    let before = bits(&model);
    let mut trainer = Trainer::new(&model, TrainerConfig { seed: 1, ..AdamWConfig::default().into() }).unwrap();
    if trainer.resume(path).is_err() {
        assert_eq!(bits(&model), before);
        assert_eq!(trainer.steps(), 0);
    }
}

libfuzzer_sys::fuzz_target!(|input: Input| {
    let path = file("state.safetensors", input.bytes);
    assert!(TrainingState::load(&path, &Device::Cpu).is_err() || input.bytes.len() > 100);
    let mut model = Small::new();
    set_trainable(&mut model, |_| true).unwrap();
    let path = folder().join("state");
    Trainer::new(&model, TrainerConfig { seed: 1, ..AdamWConfig::default().into() })
        .unwrap()
        .save(&path)
        .unwrap();
    let mut state = TrainingState::load(&path, &Device::Cpu).unwrap();
    for (name, shape, rank, value) in &input.tensors {
        let shape: Vec<usize> =
            shape.iter().take(*rank as usize % 3).map(|d| *d as usize % 7).collect();
        state.tensors.insert(name.text(), Tensor::full(*value, shape, &Device::Cpu).unwrap());
    }
    if !input.losses.is_empty() {
        state.losses = input.losses;
        state.step = input.step.into();
    }
    if state.tensors.contains_key("__metadata__") {
        return;
    }
    state.save(&path).unwrap();
    resume(&path);
});
