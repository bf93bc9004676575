//! SAM's operations at SAM's own sizes, for what compares and measures on the GPU alone: no reference in f64 could do
//! them in time.

use candle_core::{bail, DType, Device, Result, Tensor, Var, D};
use candle_sam_lora::launch::Gpu;
use candle_sam_lora::ops::{self, Activation, Lora, Projection, RelPosAttention};
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::testing::composed;

/// Sizes of a problem.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Size {
    pub batch: usize,
    /// Tokens a side; 64 for an image of 1024 x 1024.
    pub grid: usize,
    /// Heads; the model's if none.
    pub heads: Option<usize>,
    /// Whether the attention adds relative positions.
    pub tables: bool,
}

pub const REAL: Size = Size { batch: 1, grid: 64, heads: None, tables: true };
/// Sizes for the emulator.
pub const SMALL: Size = Size { grid: 16, heads: Some(1), ..REAL };

const WINDOW: usize = 14;
/// A prompt's: a score's, four masks', and two of a point.
const TOKENS: usize = 7;
const RANK: usize = 16;
const SCALING: f64 = 2.0;
const DROPOUT: Dropout = Dropout { p: 0.1, seed: 11, stream: 5 };

/// The operation of a layer.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    LayerNorm,
    Dropout,
    /// Inputs: qkv, both tables, and what a padded token projects to if windows hang over the grid.
    Attention {
        windowed: bool,
    },
    /// The mask decoder's: q of the tokens, k and v of the image, or the other way round.
    MultiHead {
        to_image: bool,
    },
    /// Inputs: x, A and B of q, A and B of v; then frozen: weight and bias of q, k and v.
    Qkv,
    /// Inputs: x, A, B; then frozen: weight, bias.
    Lin1,
    /// As Lin1; the last is the residual.
    Lin2,
    /// Inputs: x, A, B; then frozen: weight, bias, magnitude.
    Dora,
}

/// A kernel family at work in one of SAM's layers.
#[derive(Clone, Copy, Debug)]
pub struct Family {
    pub name: &'static str,
    kind: Kind,
    head_dim: usize,
    /// The model's.
    heads: usize,
}

/// The families, those that matter most first. ViT-B has 12 heads of 64 channels, ViT-H 16 of 80, and the mask decoder
/// 8 of 16.
pub const FAMILIES: [Family; 12] = {
    const fn vit_b(name: &'static str, kind: Kind) -> Family {
        Family { name, kind, head_dim: 64, heads: 12 }
    }
    const fn vit_h(name: &'static str, kind: Kind) -> Family {
        Family { name, kind, head_dim: 80, heads: 16 }
    }
    const fn decoder(name: &'static str, to_image: bool) -> Family {
        Family { name, kind: Kind::MultiHead { to_image }, head_dim: 16, heads: 8 }
    }
    [
        vit_b("attention_global_64", Kind::Attention { windowed: false }),
        vit_b("attention_windows_64", Kind::Attention { windowed: true }),
        vit_b("qkv_lora", Kind::Qkv),
        vit_b("lin1_gelu", Kind::Lin1),
        vit_b("lin2", Kind::Lin2),
        vit_h("attention_global_80", Kind::Attention { windowed: false }),
        vit_h("attention_windows_80", Kind::Attention { windowed: true }),
        vit_b("layer_norm", Kind::LayerNorm),
        vit_b("dropout", Kind::Dropout),
        vit_b("dora_linear", Kind::Dora),
        decoder("tokens_to_image", true),
        decoder("image_to_tokens", false),
    ]
};

pub fn family(name: &str) -> Result<Family> {
    match FAMILIES.into_iter().find(|family| family.name == name) {
        Some(family) => Ok(family),
        None => bail!("no family {name:?}; there are {:?}", FAMILIES.map(|family| family.name)),
    }
}

/// Who computes it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum By {
    Kernels,
    /// The kernels of this GPU, with its tiles.
    These(Gpu),
    ComposedGraph,
}

/// A family with its tensors.
#[derive(Clone, Debug)]
pub struct Layer {
    pub family: Family,
    size: Size,
    pub inputs: Vec<Tensor>,
    /// So many of the inputs, the first ones, can be trained.
    pub trainable: usize,
    /// The gradient of the output.
    pub grad: Tensor,
}

impl Layer {
    /// Tensors of this family, the same in every process.
    pub fn new(family: Family, size: Size, dtype: DType, device: &Device) -> Result<Self> {
        let Size { batch, grid, .. } = size;
        let (head_dim, heads) = (family.head_dim, size.heads.unwrap_or(family.heads));
        let dim = heads * head_dim;
        let mut seed = 0;
        let mut noise = |shape: &[usize], scale: f64| {
            seed += 1;
            noise(seed, shape, scale, device)?.to_dtype(dtype)
        };
        let mut inputs = Vec::new();
        let (trainable, out_dim) = match family.kind {
            Kind::LayerNorm => {
                inputs.push(noise(&[batch, grid, grid, dim], 1.0)?);
                inputs.push(noise(&[dim], 1.0)?);
                inputs.push(noise(&[dim], 1.0)?);
                (3, dim)
            }
            Kind::Dropout => {
                inputs.push(noise(&[batch, grid, grid, dim], 1.0)?);
                (1, dim)
            }
            Kind::Attention { windowed } => {
                let side = if windowed { WINDOW } else { grid };
                inputs.push(noise(&[batch, grid, grid, 3 * dim], 1.0)?);
                if size.tables {
                    inputs.push(noise(&[2 * side - 1, head_dim], 0.3)?);
                    inputs.push(noise(&[2 * side - 1, head_dim], 0.3)?);
                }
                if windowed && grid % WINDOW != 0 {
                    inputs.push(noise(&[3 * dim], 1.0)?);
                }
                (inputs.len(), dim)
            }
            Kind::MultiHead { to_image } => {
                let (tokens, image) = ([batch, TOKENS, dim], [batch, grid * grid, dim]);
                let [of_q, of_kv] = if to_image { [tokens, image] } else { [image, tokens] };
                for shape in [of_q, of_kv, of_kv] {
                    inputs.push(noise(&shape, 1.0)?);
                }
                (3, dim)
            }
            Kind::Qkv | Kind::Lin1 | Kind::Lin2 | Kind::Dora => {
                let (in_dim, out_dim) = match family.kind {
                    Kind::Lin1 => (dim, 4 * dim),
                    Kind::Lin2 => (4 * dim, dim),
                    _ => (dim, dim),
                };
                let (adapters, weights) = if family.kind == Kind::Qkv { (2, 3) } else { (1, 1) };
                let scale = (in_dim as f64).powf(-0.5);
                inputs.push(noise(&[batch, grid, grid, in_dim], 1.0)?);
                for _ in 0..adapters {
                    inputs.push(noise(&[RANK, in_dim], scale)?);
                    inputs.push(noise(&[out_dim, RANK], 0.1)?);
                }
                let trainable = inputs.len();
                for _ in 0..weights {
                    inputs.push(noise(&[out_dim, in_dim], scale)?);
                    inputs.push(noise(&[out_dim], 1.0)?);
                }
                match family.kind {
                    Kind::Lin2 => inputs.push(noise(&[batch, grid, grid, out_dim], 1.0)?),
                    Kind::Dora => inputs.push((noise(&[out_dim], 0.1)? + 1.0)?),
                    _ => {}
                }
                (trainable, weights * out_dim)
            }
        };
        let grad = match family.kind {
            Kind::MultiHead { .. } => noise(inputs[0].dims(), 1.0)?,
            _ => noise(&[batch, grid, grid, out_dim], 1.0)?,
        };
        Ok(Self { family, size, inputs, trainable, grad })
    }

    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        let inputs = self.inputs.iter().map(|t| t.to_dtype(dtype)).collect::<Result<_>>()?;
        Ok(Self { inputs, grad: self.grad.to_dtype(dtype)?, ..self.clone() })
    }

    /// The output for these tensors in the place of the inputs.
    pub fn run(&self, t: &[Tensor], by: By) -> Result<Tensor> {
        let fused = by != By::ComposedGraph;
        let linear = |x, projection: &Projection, activation, residual| match by {
            By::Kernels => ops::lora_linear(x, projection, activation, residual),
            By::These(gpu) => {
                ops::native::projections(x, &[*projection], activation, residual, gpu)
            }
            By::ComposedGraph => composed::lora_linear(x, projection, activation, residual),
        };
        match self.family.kind {
            Kind::LayerNorm => {
                let norm = if fused { ops::layer_norm } else { composed::layer_norm };
                norm(&t[0], &t[1], &t[2], 1e-6)
            }
            Kind::Dropout if fused => ops::dropout(&t[0], DROPOUT),
            // The mask's definition is the host's.
            Kind::Dropout => {
                let x = t[0].to_device(&Device::Cpu)?;
                ops::dropout(&x, DROPOUT)?.to_device(t[0].device())
            }
            Kind::Attention { windowed } => {
                let tables = if self.size.tables { 2 } else { 0 };
                let config = RelPosAttention {
                    num_heads: self.size.heads.unwrap_or(self.family.heads),
                    softmax_scale: (self.family.head_dim as f64).powf(-0.5),
                    rel_pos: self.size.tables.then(|| (&t[1], &t[2])),
                    window: windowed.then_some(WINDOW),
                    pad: t.get(1 + tables),
                    dropout: None,
                };
                match by {
                    By::Kernels => ops::rel_pos_attention(&t[0], &config),
                    By::These(gpu) => ops::native::rel_pos_attention(&t[0], &config, gpu),
                    By::ComposedGraph => Ok(composed::rel_pos_attention(&t[0], &config)?.0),
                }
            }
            Kind::MultiHead { .. } => {
                let heads = self.size.heads.unwrap_or(self.family.heads);
                let scale = (self.family.head_dim as f64).powf(-0.5);
                match fused {
                    true => ops::multi_head_attention(&t[0], [&t[1], &t[2]], heads, scale),
                    false => composed::multi_head_attention([&t[0], &t[1], &t[2]], heads, scale),
                }
            }
            Kind::Qkv => {
                let q = projection(&t[5..7], Some((&t[1..3], Some(DROPOUT))));
                let k = projection(&t[7..9], None);
                let dropout = Dropout { stream: 6, ..DROPOUT };
                let v = projection(&t[9..11], Some((&t[3..5], Some(dropout))));
                let (x, parts) = (&t[0], [q, k, v]);
                match by {
                    By::Kernels => ops::lora_qkv(x, &parts),
                    By::These(gpu) => {
                        ops::native::projections(x, &parts, Activation::Identity, None, gpu)
                    }
                    By::ComposedGraph => composed::lora_qkv(x, &parts),
                }
            }
            Kind::Lin1 => {
                let projection = projection(&t[3..5], Some((&t[1..3], Some(DROPOUT))));
                linear(&t[0], &projection, Activation::Gelu, None)
            }
            Kind::Lin2 => {
                let projection = projection(&t[3..5], Some((&t[1..3], None)));
                linear(&t[0], &projection, Activation::Identity, Some(&t[5]))
            }
            Kind::Dora => {
                let adapted = projection(&t[3..5], Some((&t[1..3], None)));
                if fused {
                    return ops::dora_linear(&t[0], &adapted, &t[5]);
                }
                // PEFT's: no gradient goes through the norm.
                let delta = (t[2].matmul(&t[1])? * SCALING)?;
                let norm = (&t[3] + delta)?.to_dtype(DType::F32)?.sqr()?.sum(D::Minus1)?.sqrt()?;
                let norm = norm.to_dtype(t[0].dtype())?.detach();
                let without_bias = Projection { bias: None, ..adapted };
                let y = composed::lora_linear(&t[0], &without_bias, Activation::Identity, None)?;
                y.broadcast_mul(&(&t[5] / norm)?)?.broadcast_add(&t[4])
            }
        }
    }

    /// The first `trained` inputs as variables, and `sum(output * grad)`.
    pub fn loss(&self, trained: usize, by: By) -> Result<(Vec<Var>, Tensor, Tensor)> {
        let inputs = &self.inputs[..trained];
        let variables = inputs.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let mut inputs: Vec<_> = variables.iter().map(|v| v.as_tensor().clone()).collect();
        inputs.extend_from_slice(&self.inputs[trained..]);
        let out = self.run(&inputs, by)?;
        let loss = (&out * &self.grad)?.sum_all()?;
        Ok((variables, out, loss))
    }

    /// The output, and the gradient of each trained input.
    pub fn results(&self, trained: usize, by: By) -> Result<Vec<Tensor>> {
        let (variables, out, loss) = self.loss(trained, by)?;
        let mut gradients = loss.backward()?;
        let mut results = vec![out];
        for (index, variable) in variables.iter().enumerate() {
            match gradients.remove(variable) {
                Some(gradient) => results.push(gradient),
                None => bail!("{}: input {index} got no gradient", self.family.name),
            }
        }
        Ok(results)
    }

    /// Floating-point operations of the formula: forward; backward down to x and the adapters.
    pub fn flops(&self) -> [f64; 2] {
        let Size { batch, grid, .. } = self.size;
        let (rows, out_dim) = ((batch * grid * grid) as f64, self.grad.elem_count() as f64);
        let in_dim = self.inputs[0].elem_count() as f64 / rows;
        match self.family.kind {
            // Two products, and five.
            Kind::Attention { windowed } => {
                let keys = if windowed { WINDOW * WINDOW } else { grid * grid } as f64;
                let product = 2.0 * keys * out_dim;
                [2.0 * product, 5.0 * product]
            }
            Kind::MultiHead { .. } => {
                let product = 2.0 * self.inputs[1].dims()[1] as f64 * out_dim;
                [2.0 * product, 5.0 * product]
            }
            Kind::Qkv | Kind::Lin1 | Kind::Lin2 | Kind::Dora => {
                let of_adapters = self.inputs[1..self.trainable].iter();
                let adapters =
                    2.0 * rows * of_adapters.map(Tensor::elem_count).sum::<usize>() as f64;
                let product = 2.0 * in_dim * out_dim;
                [product + adapters, product + 2.0 * adapters]
            }
            Kind::LayerNorm | Kind::Dropout => [0.0; 2],
        }
    }
}

/// A projection from `[weight, bias]`, and from `[A, B]` and a dropout.
fn projection<'a>(
    base: &'a [Tensor],
    lora: Option<(&'a [Tensor], Option<Dropout>)>,
) -> Projection<'a> {
    let lora = lora.map(|(t, dropout)| Lora {
        a: &t[0],
        b: &t[1],
        b_bias: None,
        scaling: SCALING,
        dropout,
    });
    Projection { weight: &base[0], scales: None, bias: Some(&base[1]), lora }
}

/// Roughly normal numbers. They repeat after a prime number of them, so that no two rows are alike and the host makes
/// few.
fn noise(seed: u64, shape: &[usize], scale: f64, device: &Device) -> Result<Tensor> {
    const PERIOD: usize = 262_139;
    let count = shape.iter().product::<usize>();
    let period = (crate::common::random(seed, count.min(PERIOD)) * scale)?.to_vec1::<f32>()?;
    let values: Vec<f32> = period.into_iter().cycle().take(count).collect();
    Tensor::from_vec(values, shape, device)
}
