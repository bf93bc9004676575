//! Memory that gradient checkpointing saves: the activations of all layers but one.

use crate::counting::peak;
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::nn::{set_trainable, Mode};
use candle_sam_lora::sam::{AttentionKind, SamConfig, SamModel};

pub fn memory_grows_by_one_tensor_a_layer() -> anyhow::Result<()> {
    const SIDE: usize = 16;
    const WIDTH: usize = 64;
    let peak_of = |layers: usize, checkpointed: bool| -> anyhow::Result<usize> {
        let mut config = SamConfig::default();
        let vision = &mut config.vision_config;
        (vision.hidden_size, vision.num_attention_heads) = (WIDTH, 2);
        vision.num_hidden_layers = layers;
        vision.global_attn_indexes = vec![layers as i64 - 1];
        (vision.image_size, vision.patch_size, vision.window_size) = (8 * SIDE, 8, 7);
        let prompt = &mut config.prompt_encoder_config;
        (prompt.image_size, prompt.patch_size) = (8 * SIDE, 8);
        let mut model = SamModel::new(
            &config,
            AttentionKind::Split,
            VarBuilder::zeros(DType::F32, &Device::Cpu),
        )?;
        model.randomize(1, 0.05)?;
        set_trainable(&mut model, |name| name.contains("attn.q.bias"))?;
        let mut encoder = model.vision_encoder;
        encoder.gradient_checkpointing = checkpointed;
        let pixels = Tensor::ones((1, 3, 8 * SIDE, 8 * SIDE), DType::F32, &Device::Cpu)?;
        let mode = Mode::Train { seed: 1 };
        Ok(peak(|| encoder.forward(&pixels, mode)?.sqr()?.mean_all()?.backward())?.1)
    };
    let growth = |checkpointed: bool| -> anyhow::Result<usize> {
        let (few, many) = (peak_of(4, checkpointed)?, peak_of(12, checkpointed)?);
        println!("checkpointed {checkpointed}: {few} B with 4 layers, {many} B with 12");
        Ok(many.saturating_sub(few) / 8)
    };
    // The first run leaves buffers behind that the next ones use again; they are no layer's.
    peak_of(4, false)?;
    let (plain, checkpointed) = (growth(false)?, growth(true)?);
    let tokens = SIDE * SIDE * WIDTH * 4;
    println!(
        "a layer more takes {plain} B, checkpointed {checkpointed} B; its input is {tokens} B"
    );
    // Its input, and small change: the graph's nodes, the flat parameters and their gradients.
    assert!(checkpointed < tokens + tokens / 4, "{checkpointed} bytes");
    assert!(plain > 8 * checkpointed, "{plain} and {checkpointed} bytes");
    Ok(())
}
