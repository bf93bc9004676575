//! LoRA on a model that is not SAM: a vision transformer of candle_nn's layers, under timm's names.
//!
//! The lines marked 1 to 4 are the guide's steps. Load the model, write its attention with `q`, `k` and `v` apart, swap
//! it in, add LoRA to `q` and `v`. The base learns to find nuclei; LoRA then teaches it coins.

use anyhow::{ensure, Result};
use candle_core::{DType, Device, Tensor, D};
use candle_nn::{AdamW, Conv2d, Linear, Module, Optimizer, ParamsAdamW, VarBuilder, VarMap};
use candle_sam_lora::lora::{read_adapter, write_adapter, LoraConfig, LoraLinear};
use candle_sam_lora::nn::LayerNorm; // candle_nn's has no backward
use candle_sam_lora::ops::{rel_pos_attention, RelPosAttention};
use candle_sam_lora::sam::read_image;
use std::collections::BTreeMap;
use std::path::Path;

/// Sizes of the transformer, whose image and patches are square.
pub struct Config {
    pub side: usize,
    pub patch: usize,
    pub dim: usize,
    pub hidden: usize,
    pub depth: usize,
    pub heads: usize,
}

/// An adapter: its configuration, and a builder below PEFT's prefix.
pub type Lora<'a> = Option<(&'a LoraConfig, VarBuilder<'a>)>;

/// 2. The attention with `q`, `k` and `v` apart. It was `struct Attention { qkv: Linear, proj: Linear, heads: usize }`.
struct Attention {
    q: LoraLinear,
    k: LoraLinear,
    v: LoraLinear,
    proj: Linear,
    heads: usize,
}

impl Attention {
    fn new(config: &Config, vb: VarBuilder, lora: &Lora) -> candle_core::Result<Self> {
        let dim = config.dim;
        let qkv = candle_nn::linear(dim, 3 * dim, vb.pp("qkv"))?;
        let rows = |part: usize, name: &str| {
            let take = |tensor: &Tensor| tensor.narrow(0, part * dim, dim);
            let base = Linear::new(take(qkv.weight())?, qkv.bias().map(take).transpose()?);
            match lora {
                // 4. LoRA, where the configuration targets the layer. The adapter's path is the layer's.
                Some((config, adapter)) => {
                    LoraLinear::new(base, config, adapter.pp(vb.prefix()).pp(name))
                }
                None => Ok(base.into()),
            }
        };
        let proj = candle_nn::linear(dim, dim, vb.pp("proj"))?;
        Ok(Self { q: rows(0, "q")?, k: rows(1, "k")?, v: rows(2, "v")?, proj, heads: config.heads })
    }
}

impl Module for Attention {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let (batch, tokens, dim) = x.dims3()?;
        let qkv =
            Tensor::cat(&[x.apply(&self.q)?, x.apply(&self.k)?, x.apply(&self.v)?], D::Minus1)?;
        let attention = RelPosAttention {
            num_heads: self.heads,
            softmax_scale: ((dim / self.heads) as f64).powf(-0.5),
            rel_pos: None,
            window: None,
            pad: None,
            dropout: None,
        };
        // Softmax attention of any tokens: a grid of one row, without the N x N weights.
        let qkv = qkv.reshape((batch, 1, tokens, 3 * dim))?;
        rel_pos_attention(&qkv, &attention)?.reshape((batch, tokens, dim))?.apply(&self.proj)
    }
}

struct Block {
    norm1: LayerNorm,
    attn: Attention,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

impl Block {
    fn new(config: &Config, vb: VarBuilder, lora: &Lora) -> candle_core::Result<Self> {
        Ok(Self {
            norm1: LayerNorm::load(config.dim, 1e-6, vb.pp("norm1"))?,
            attn: Attention::new(config, vb.pp("attn"), lora)?, // 3. Swap it in.
            norm2: LayerNorm::load(config.dim, 1e-6, vb.pp("norm2"))?,
            fc1: candle_nn::linear(config.dim, config.hidden, vb.pp("mlp.fc1"))?,
            fc2: candle_nn::linear(config.hidden, config.dim, vb.pp("mlp.fc2"))?,
        })
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = (x + x.apply(&self.norm1)?.apply(&self.attn)?)?;
        &x + x.apply(&self.norm2)?.apply(&self.fc1)?.gelu_erf()?.apply(&self.fc2)?
    }
}

/// `[B, 1, side, side] -> [B, patches, patch * patch]`: a logit for each pixel, patch by patch.
pub struct Vit {
    patch_embed: Conv2d,
    pos_embed: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
    head: Linear,
}

impl Vit {
    pub fn new(config: &Config, vb: VarBuilder, lora: &Lora) -> candle_core::Result<Self> {
        let Config { side, patch, dim, depth, .. } = *config;
        let conv = candle_nn::Conv2dConfig { stride: patch, ..Default::default() };
        let block = |index| Block::new(config, vb.pp("blocks").pp(index), lora);
        Ok(Self {
            patch_embed: candle_nn::conv2d(1, dim, patch, conv, vb.pp("patch_embed.proj"))?,
            pos_embed: vb.get((1, (side / patch).pow(2), dim), "pos_embed")?,
            blocks: (0..depth).map(block).collect::<candle_core::Result<_>>()?,
            norm: LayerNorm::load(dim, 1e-6, vb.pp("norm"))?,
            head: candle_nn::linear(dim, patch * patch, vb.pp("head"))?,
        })
    }
}

impl Module for Vit {
    fn forward(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = x.apply(&self.patch_embed)?.flatten_from(2)?.transpose(1, 2)?;
        let x = x.contiguous()?.broadcast_add(&self.pos_embed)?;
        let x = self.blocks.iter().try_fold(x, |x, block| x.apply(block))?;
        x.apply(&self.norm)?.apply(&self.head)
    }
}

/// Images `[N, 1, side, side]` and masks `[N, patches, patch * patch]` of a folder, cut into squares.
fn photographs(folder: &str, config: &Config) -> Result<(Tensor, Tensor)> {
    let (side, patch) = (config.side, config.patch);
    let mut files: Vec<_> = std::fs::read_dir(Path::new(folder).join("images"))?
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<_>>()?;
    files.sort();
    let (mut images, mut masks) = (vec![], vec![]);
    for name in files {
        let [image, mask] =
            ["images", "masks"].map(|kind| read_image(Path::new(folder).join(kind).join(&name)));
        let (image, mask) = (image?.to_luma8(), mask?.to_luma8());
        let (width, height) = (image.width() as usize / side, image.height() as usize / side);
        for (row, column) in (0..height).flat_map(|row| (0..width).map(move |column| (row, column)))
        {
            let pixels = (0..side * side)
                .map(|i| ((column * side + i % side) as u32, (row * side + i / side) as u32));
            images
                .extend(pixels.clone().map(|(x, y)| f32::from(image.get_pixel(x, y).0[0]) / 255.));
            masks.extend(pixels.map(|(x, y)| f32::from(u8::from(mask.get_pixel(x, y).0[0] > 0))));
        }
    }
    let (count, grid) = (images.len() / (side * side), side / patch);
    let masks = Tensor::from_vec(masks, (count, grid, patch, grid, patch), &Device::Cpu)?;
    let masks = masks.permute((0, 1, 3, 2, 4))?.reshape((count, grid * grid, patch * patch))?;
    Ok((Tensor::from_vec(images, (count, 1, side, side), &Device::Cpu)?, masks))
}

/// Sets matrices to values between -1 and 1 over the square root of their inputs, and biases to zero. The values depend
/// on `seed` alone; candle's own are others in every run.
fn initialise(map: &VarMap, mut seed: u64) -> Result<()> {
    let mut uniform = || {
        // Steele, Lea and Flood's splitmix64.
        seed = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = (seed ^ (seed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    let variables = BTreeMap::from_iter(map.data().lock().unwrap().clone());
    for (name, variable) in variables {
        let (shape, count) = (variable.shape(), variable.elem_count());
        if shape.rank() > 1 {
            let scale = (count as f32 / shape.dims()[0] as f32).sqrt().recip();
            let values = (0..count).map(|_| scale * uniform()).collect();
            variable.set(&Tensor::from_vec(values, shape, &Device::Cpu)?)?;
        } else if name.ends_with("bias") {
            variable.set(&variable.zeros_like()?)?;
        }
    }
    Ok(())
}

/// Trains the variables of a map with candle's own optimizer.
fn train(
    model: &Vit,
    map: &VarMap,
    (images, masks): &(Tensor, Tensor),
    steps: usize,
) -> Result<()> {
    let config = ParamsAdamW { lr: 4e-3, weight_decay: 0.0, ..Default::default() };
    let mut optimizer = AdamW::new(map.all_vars(), config)?;
    let (count, batch) = (images.dim(0)?, 16);
    for step in 0..steps {
        let first = step * batch % (count - batch + 1).max(1);
        let [images, masks] = [images, masks].map(|tensor| tensor.narrow(0, first, batch));
        let logits = model.forward(&images?)?;
        let loss = candle_nn::loss::binary_cross_entropy_with_logit(&logits, &masks?)?;
        optimizer.backward_step(&loss)?;
        if step % 40 == 0 {
            println!("  step {step}: loss {:.4}", loss.to_scalar::<f32>()?);
        }
    }
    Ok(())
}

/// IoU over all pixels.
fn iou(model: &Vit, (images, masks): &(Tensor, Tensor)) -> Result<f32> {
    let found = model.forward(images)?.gt(0.0)?.to_dtype(DType::F32)?;
    let both = (&found * masks)?.sum_all()?.to_scalar::<f32>()?;
    let either = found.maximum(masks)?.sum_all()?.to_scalar::<f32>()?;
    Ok(both / either)
}

pub fn main() -> Result<()> {
    let config = Config { side: 64, patch: 8, dim: 48, hidden: 96, depth: 2, heads: 4 };
    let nuclei = photographs("assets/photos/nuclei/train", &config)?;
    let coins = photographs("assets/photos/coins/train", &config)?;
    let heldout = photographs("assets/photos/coins/heldout", &config)?;
    let folder = std::env::temp_dir().join("candle-sam-lora-any-model");
    std::fs::create_dir_all(&folder)?;

    println!("the base, trained on nuclei");
    let map = VarMap::new();
    let base = Vit::new(&config, VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu), &None)?;
    initialise(&map, 4)?;
    train(&base, &map, &nuclei, 120)?;
    map.save(folder.join("vit.safetensors"))?;

    // 1. Load the model, with its fused qkv.
    let file = std::fs::read(folder.join("vit.safetensors"))?;
    let vb = VarBuilder::from_buffered_safetensors(file, DType::F32, &Device::Cpu)?;
    let lora = LoraConfig::new(8).alpha(16.0).target_modules(["q", "v"]);
    let map = VarMap::new();
    let adapter = VarBuilder::from_varmap(&map, DType::F32, &Device::Cpu).pp("base_model.model");
    let model = Vit::new(&config, vb.clone(), &Some((&lora, adapter)))?;
    let trained: usize = map.all_vars().iter().map(|variable| variable.elem_count()).sum();
    println!("LoRA on q and v, {trained} parameters, trained on coins");
    let before = iou(&model, &heldout)?;
    train(&model, &map, &coins, 120)?;
    let after = iou(&model, &heldout)?;
    println!("held-out coins: IoU {before:.3} before, {after:.3} after");
    ensure!(after > before + 0.03, "LoRA must help");

    // peft's PeftModel.from_pretrained reads the folder, over a model of these names.
    let variables = map.data().lock().unwrap().clone().into_iter();
    let tensors = variables.map(|(key, variable)| (key, variable.into_inner())).collect();
    write_adapter(&lora, &tensors, folder.join("adapter"))?;
    let (lora, tensors) = read_adapter(folder.join("adapter"))?;
    let adapter = VarBuilder::from_tensors(tensors.into_iter().collect(), DType::F32, &Device::Cpu);
    let loaded = Vit::new(&config, vb, &Some((&lora, adapter.pp("base_model.model"))))?;
    ensure!(iou(&loaded, &heldout)? == after, "the loaded adapter must compute the same");
    println!("adapter written to {}", folder.join("adapter").display());
    Ok(())
}
