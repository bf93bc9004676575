//! The image encoder alone: an image becomes an embedding, with the state after every layer.

use anyhow::Result;
use candle_core::{DType, Device};
use candle_sam_lora::nn::Mode;
use candle_sam_lora::sam::{read_image, AttentionKind, SamModel, SamProcessor};
use candle_sam_lora::write_tensors;
use std::collections::BTreeMap;

pub fn main() -> Result<()> {
    let (folder, device) = ("assets/tiny-sam", Device::Cpu);
    let model = SamModel::from_pretrained(folder, AttentionKind::Fused, DType::F32, &device)?;
    let processor = SamProcessor::load(folder, model.config().vision_config.image_size)?;

    let image = read_image("assets/photos/nuclei/heldout/images/nuclei_r6c0.png")?;
    let (pixel_values, frame) = processor.preprocess(&image, &device)?;
    println!("{frame:?} becomes {:?}", pixel_values.dims());
    let encoded = model.vision_encoder.forward_with_states(&pixel_values, false, Mode::Eval)?;
    for (layer, state) in encoded.hidden_states.iter().enumerate() {
        println!("state {layer}: {:?}", state.dims());
    }
    println!("embedding: {:?}", encoded.image_embeddings.dims());

    let tensors = BTreeMap::from([("image_embeddings".to_string(), encoded.image_embeddings)]);
    write_tensors(std::env::temp_dir().join("candle-sam-lora-embedding.safetensors"), &tensors)?;
    Ok(())
}
