//! Layers of the image encoder as one node of candle's graph: gradients have the bits that the blocks have apart. Where
//! an attention of a user's uses a block's output once more, they are the same sums in another order.

use crate::common::{random, values};
use crate::{trial, with_each};
use candle_core::{DType, Device, Error, Result, Tensor};
use candle_nn::VarBuilder;
use candle_sam_lora::lora::{inject, InitLoraWeights, LoraConfig};
use candle_sam_lora::module_tree;
use candle_sam_lora::nn::{self, trainable_variables, LayerNorm, Mode};
use candle_sam_lora::sam::{AttentionKind, SamVisionConfig, SamVisionEncoder, VisionAttention};
use libtest_mimic::Trial;

const MODE: Mode = Mode::Train { seed: 3 };

pub fn trials() -> Vec<Trial> {
    type Test = fn(&Device) -> Result<()>;
    let tests: [(&str, Test); 2] = [
        ("blocks joined", bits_are_those_of_blocks_apart),
        ("blocks joined and a branch", a_branch_gets_its_share),
    ];
    let of = |(name, test): (&str, Test)| {
        trial(name.to_string(), move |device| with_each(device, || test(device)))
    };
    tests.map(of).into()
}

/// Adapters on `targets`, with B of random numbers, in an encoder of three layers that kernels compute.
fn encoder(targets: &[&str], dtype: DType, device: &Device) -> Result<SamVisionEncoder> {
    let config = SamVisionConfig {
        hidden_size: 128,
        num_hidden_layers: 3,
        num_attention_heads: 2,
        image_size: 40,
        patch_size: 8,
        output_channels: 32,
        window_size: 3,
        global_attn_indexes: vec![1],
        mlp_dim: Some(128),
        ..SamVisionConfig::default()
    };
    let zeros = VarBuilder::zeros(dtype, device);
    let mut encoder = SamVisionEncoder::new(&config, AttentionKind::Split, zeros)?;
    nn::randomize(&mut encoder, 1, 0.1).map_err(Error::wrap)?;
    let mut lora = LoraConfig::new(4).dropout(0.2).target_modules(targets.iter().copied());
    lora.init_lora_weights = InitLoraWeights::Default(false);
    inject(&mut encoder, &lora, 2).map_err(Error::wrap)?;
    Ok(encoder)
}

/// As the encoder's forward, block by block.
fn apart(encoder: &SamVisionEncoder, image: &Tensor) -> Result<Tensor> {
    let mut x = encoder.patch_embed.forward(image, MODE)?;
    if let Some(pos_embed) = &encoder.pos_embed {
        x = (x + pos_embed)?;
    }
    for layer in &encoder.layers {
        x = layer.attn.forward_normed(&x, &layer.layer_norm1, MODE)?;
        x = layer.mlp.forward_normed(&x, &layer.layer_norm2, MODE)?;
    }
    encoder.neck.forward(&x, MODE)?.permute((0, 3, 1, 2))
}

/// The value and the gradient of each adapter's parts, by name.
type Results = (Vec<f64>, Vec<(String, Vec<f64>)>);

fn results(encoder: &SamVisionEncoder, out: &Tensor, dout: &Tensor) -> Result<Results> {
    let store = (out * dout)?.sum_all()?.backward()?;
    let mut gradients = vec![];
    for (name, variable) in trainable_variables(encoder)? {
        let gradient = store.get(&variable).ok_or_else(|| Error::msg(format!("{name}: none")))?;
        gradients.push((name, values(gradient)));
    }
    Ok((values(out), gradients))
}

/// Joined, and apart.
fn both(encoder: &SamVisionEncoder, dtype: DType, device: &Device) -> Result<[Results; 2]> {
    let image = random(5, &[1, 3, 40, 40]).to_device(device)?;
    let joined = encoder.forward(&image, MODE)?;
    let dout = random(6, joined.shape()).to_dtype(dtype)?.to_device(device)?;
    let of_joined = results(encoder, &joined, &dout)?;
    Ok([of_joined, results(encoder, &apart(encoder, &image)?, &dout)?])
}

/// Nodes end where a third trained input would come: within the third layer, or after each block.
fn bits_are_those_of_blocks_apart(device: &Device) -> Result<()> {
    let dtype = DType::BF16;
    for targets in [&["q", "v"][..], &["q", "v", "proj", "lin1"]] {
        let encoder = encoder(targets, dtype, device)?;
        let [(out, gradients), (expected, of_apart)] = both(&encoder, dtype, device)?;
        assert!(out == expected, "{targets:?}: another output");
        assert!(!gradients.is_empty() && gradients.len() == of_apart.len());
        for ((name, got), (_, expected)) in gradients.iter().zip(&of_apart) {
            assert!(got.iter().any(|x| *x != 0.0), "{targets:?} {name}: zeros");
            assert!(got == expected, "{targets:?} {name}: another gradient");
        }
    }
    Ok(())
}

/// The attention block of another, and half of x once more.
#[derive(Clone, Debug)]
struct Branched {
    inner: Box<dyn VisionAttention>,
}

module_tree!(Branched { inner => "" });

impl VisionAttention for Branched {
    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
        self.inner.forward(x, mode)
    }

    fn forward_normed(&self, x: &Tensor, norm: &LayerNorm, mode: Mode) -> Result<Tensor> {
        self.inner.forward_normed(x, norm, mode)? + (x * 0.5)?
    }
}

fn a_branch_gets_its_share(device: &Device) -> Result<()> {
    /// For f32 sums in another order, relative to the largest element.
    const TOLERANCE: f64 = 1e-5;
    let mut encoder = encoder(&["q", "v"], DType::F32, device)?;
    let layer = &mut encoder.layers[2];
    layer.attn = Box::new(Branched { inner: layer.attn.clone() });
    let [(_, gradients), (_, of_apart)] = both(&encoder, DType::F32, device)?;
    for ((name, got), (_, expected)) in gradients.iter().zip(&of_apart) {
        let most = expected.iter().fold(0f64, |most, x| most.max(x.abs()));
        let error = got.iter().zip(expected).fold(0f64, |most, (a, b)| most.max((a - b).abs()));
        assert!(most > 0.0 && error <= TOLERANCE * most, "{name}: off by {error:e} of {most:e}");
    }
    Ok(())
}
