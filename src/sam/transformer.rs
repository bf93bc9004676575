//! The mask decoder's two-way transformer: prompt tokens attend to the image and the image to the tokens.
//!
//! ```text
//! queries = norm1(queries + self_attn(queries + t))             t = the tokens as they came; layer 0 adds neither
//! queries = norm2(queries + attn(q = queries + t, k = keys + p, v = keys))         p = the image's positions
//! queries = norm3(queries + mlp(queries))
//! keys    = norm4(keys + attn(q = keys + p, k = queries + t, v = queries))
//! ```
//! Tokens are `[G, N, C]` and the image `[G, h w, C]`, where G counts the prompts of all images.
//!
//! Source: `SamTwoWayTransformer` in `modeling_sam.py`.

use super::config::CROSS_DOWNSAMPLE_RATE;
use super::validate::require_dtype;
use super::SamMaskDecoderConfig;
use crate::module_tree;
use crate::nn::{LayerNorm, Linear, MlpBlock, Mode};
use crate::ops::{self, Activation};
use candle_core::{bail, DType, Result, Tensor, D};
use candle_nn::VarBuilder;

/// Epsilon of the final norm: torch's default, where all others have the configuration's.
const FINAL_EPS: f64 = 1e-5;

/// Multi-head attention inside `hidden_size / downsample_rate` channels.
#[derive(Clone, Debug)]
pub struct SamAttention {
    /// Of what attends.
    pub q_proj: Linear,
    /// Of what is attended to.
    pub k_proj: Linear,
    /// Of what is attended to.
    pub v_proj: Linear,
    /// Back to `hidden_size`.
    pub out_proj: Linear,
    /// Number of heads.
    pub num_heads: usize,
}

module_tree!(SamAttention { q_proj, k_proj, v_proj, out_proj });

impl SamAttention {
    /// For a configuration that was validated.
    fn new(
        config: &SamMaskDecoderConfig,
        downsample_rate: usize,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let (size, inner) = (config.hidden_size, config.hidden_size / downsample_rate);
        let down = |name| Linear::load(size, inner, vb.pp(name));
        Ok(Self {
            q_proj: down("q_proj")?,
            k_proj: down("k_proj")?,
            v_proj: down("v_proj")?,
            out_proj: Linear::load(inner, size, vb.pp("out_proj"))?,
            num_heads: config.num_attention_heads,
        })
    }

    /// `q [G, N, C]`, `k` and `v [G, M, C]` -> `residual + attention`, `[G, N, C]`
    pub fn forward(
        &self,
        [q, k, v]: [&Tensor; 3],
        residual: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        let q = self.heads(&self.q_proj, q, mode)?;
        let k = self.heads(&self.k_proj, k, mode)?;
        let v = self.heads(&self.v_proj, v, mode)?;
        self.attend([&q, &k, &v], residual, mode)
    }

    /// `[G, N, C]` projected, `[G, heads, N, head_dim]`.
    fn heads(&self, projection: &Linear, x: &Tensor, mode: Mode) -> Result<Tensor> {
        let (groups, tokens, _) = x.dims3()?;
        projection
            .forward(x, mode)?
            .reshape((groups, tokens, self.num_heads, ()))?
            .transpose(1, 2)?
            .contiguous()
    }

    /// From q, k and v `[G, heads, N or M, head_dim]` on.
    fn attend(
        &self,
        [q, k, v]: [&Tensor; 3],
        residual: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        let softmax_scale = (q.dim(D::Minus1)? as f64).powf(-0.5);
        let scores = (ops::matmul(q, &k.t()?)? * softmax_scale)?.to_dtype(DType::F32)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
        let out = ops::matmul(&weights, v)?.transpose(1, 2)?.flatten_from(2)?;
        self.out_proj.forward_fused(&out, Activation::Identity, residual, mode)
    }
}

/// One two-way layer.
#[derive(Clone, Debug)]
pub struct SamTwoWayAttentionBlock {
    /// Among the tokens.
    pub self_attn: SamAttention,
    /// After `self_attn`.
    pub layer_norm1: LayerNorm,
    /// The tokens look at the image.
    pub cross_attn_token_to_image: SamAttention,
    /// After `cross_attn_token_to_image`.
    pub layer_norm2: LayerNorm,
    /// Of the tokens.
    pub mlp: MlpBlock,
    /// After `mlp`.
    pub layer_norm3: LayerNorm,
    /// After `cross_attn_image_to_token`.
    pub layer_norm4: LayerNorm,
    /// The image looks at the tokens.
    pub cross_attn_image_to_token: SamAttention,
    /// In the first layer, where the tokens are their own positions: self attention adds neither these nor a residual.
    pub skip_first_layer_pe: bool,
}

module_tree!(SamTwoWayAttentionBlock {
    self_attn,
    layer_norm1,
    cross_attn_token_to_image,
    layer_norm2,
    mlp,
    layer_norm3,
    layer_norm4,
    cross_attn_image_to_token,
});

impl SamTwoWayAttentionBlock {
    /// For a configuration that was validated.
    fn new(
        config: &SamMaskDecoderConfig,
        skip_first_layer_pe: bool,
        vb: VarBuilder<'_>,
    ) -> Result<Self> {
        let (size, activation) = (config.hidden_size, config.hidden_act.into());
        let norm = |name| LayerNorm::load(size, config.layer_norm_eps, vb.pp(name));
        let cross = |name| SamAttention::new(config, CROSS_DOWNSAMPLE_RATE, vb.pp(name));
        Ok(Self {
            self_attn: SamAttention::new(config, 1, vb.pp("self_attn"))?,
            layer_norm1: norm("layer_norm1")?,
            cross_attn_token_to_image: cross("cross_attn_token_to_image")?,
            layer_norm2: norm("layer_norm2")?,
            mlp: MlpBlock::load(size, config.mlp_dim, activation, vb.pp("mlp"))?,
            layer_norm3: norm("layer_norm3")?,
            layer_norm4: norm("layer_norm4")?,
            cross_attn_image_to_token: cross("cross_attn_image_to_token")?,
            skip_first_layer_pe,
        })
    }

    /// What the layer takes from an image that several prompts share.
    fn share(&self, image: &Tensor, positions: &Tensor, mode: Mode) -> Result<SharedHeads> {
        let placed = ops::broadcast_add(image, positions)?;
        let (to_image, to_tokens) =
            (&self.cross_attn_token_to_image, &self.cross_attn_image_to_token);
        Ok(SharedHeads {
            k: to_image.heads(&to_image.k_proj, &placed, mode)?,
            v: to_image.heads(&to_image.v_proj, image, mode)?,
            q: to_tokens.heads(&to_tokens.q_proj, &placed, mode)?,
        })
    }

    /// Queries with their positions, and keys with what [`share`](Self::share) made of them, to new queries and keys.
    fn forward(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        query_positions: &Tensor,
        image: &SharedHeads,
        mode: Mode,
    ) -> Result<(Tensor, Tensor)> {
        let queries = if self.skip_first_layer_pe {
            self.self_attn.forward([queries, queries, queries], None, mode)?
        } else {
            let placed = (queries + query_positions)?;
            self.self_attn.forward([&placed, &placed, queries], Some(queries), mode)?
        };
        let queries = self.layer_norm1.forward(&queries)?;

        let placed = (&queries + query_positions)?;
        let to_image = &self.cross_attn_token_to_image;
        let q = to_image.heads(&to_image.q_proj, &placed, mode)?;
        let queries = to_image.attend([&q, &image.k, &image.v], Some(&queries), mode)?;
        let queries = self.layer_norm2.forward(&queries)?;

        let queries =
            self.layer_norm3.forward(&self.mlp.forward_onto(&queries, Some(&queries), mode)?)?;

        let placed = (&queries + query_positions)?;
        let to_tokens = &self.cross_attn_image_to_token;
        let k = to_tokens.heads(&to_tokens.k_proj, &placed, mode)?;
        let v = to_tokens.heads(&to_tokens.v_proj, &queries, mode)?;
        let keys = to_tokens.attend([&image.q, &k, &v], Some(keys), mode)?;
        Ok((queries, self.layer_norm4.forward(&keys)?))
    }
}

/// Heads of the image, `[G, heads, h w, head_dim]`: what tokens look at, and what looks at tokens.
#[derive(Clone, Debug)]
struct SharedHeads {
    k: Tensor,
    v: Tensor,
    q: Tensor,
}

impl SharedHeads {
    /// For each of `prompts` prompts, `[B, ..] -> [B P, ..]`.
    fn repeat(&self, prompts: usize) -> Result<Self> {
        let repeat = |x: &Tensor| repeat_for(x, prompts);
        Ok(Self { k: repeat(&self.k)?, v: repeat(&self.v)?, q: repeat(&self.q)? })
    }
}

/// An image `[B, ..]` for each of its prompts, `[B P, ..]`.
fn repeat_for(image: &Tensor, prompts: usize) -> Result<Tensor> {
    if prompts == 1 {
        return Ok(image.clone());
    }
    let dims = image.dims();
    let wide = ops::repeat(&image.unsqueeze(1)?, [&[dims[0], prompts], &dims[1..]].concat())?;
    wide.flatten(0, 1)
}

/// An image that prompts share, as the first layer sees it; made once by [`SamTwoWayTransformer::share`].
#[derive(Clone, Debug)]
pub struct SharedImage {
    image: Tensor,
    positions: Tensor,
    first: Option<SharedHeads>,
}

impl SharedImage {
    /// The images from `first` on.
    pub(super) fn narrow(&self, first: usize, count: usize) -> Result<Self> {
        let narrow = |x: &Tensor| x.narrow(0, first, count);
        let heads = |SharedHeads { k, v, q }: &SharedHeads| {
            Ok::<_, candle_core::Error>(SharedHeads { k: narrow(k)?, v: narrow(v)?, q: narrow(q)? })
        };
        Ok(Self {
            image: narrow(&self.image)?,
            positions: self.positions.clone(),
            first: self.first.as_ref().map(heads).transpose()?,
        })
    }
}

/// The layers and a last look of the tokens at the image.
#[derive(Clone, Debug)]
pub struct SamTwoWayTransformer {
    /// The two-way layers.
    pub layers: Vec<SamTwoWayAttentionBlock>,
    /// The tokens look at the image once more.
    pub final_attn_token_to_image: SamAttention,
    /// After it; epsilon 1e-5.
    pub layer_norm_final_attn: LayerNorm,
}

module_tree!(SamTwoWayTransformer { layers, final_attn_token_to_image, layer_norm_final_attn });

impl SamTwoWayTransformer {
    /// With the tensors of a `VarBuilder`.
    ///
    /// # Errors
    /// As [`SamMaskDecoder::new`](super::SamMaskDecoder::new).
    pub fn new(config: &SamMaskDecoderConfig, vb: VarBuilder<'_>) -> Result<Self> {
        config.validate()?;
        require_dtype(vb.dtype())?;
        let layers = (0..config.num_hidden_layers)
            .map(|i| SamTwoWayAttentionBlock::new(config, i == 0, vb.pp("layers").pp(i)));
        let (rate, final_attn) =
            (config.attention_downsample_rate, vb.pp("final_attn_token_to_image"));
        let norm = vb.pp("layer_norm_final_attn");
        Ok(Self {
            layers: layers.collect::<Result<_>>()?,
            final_attn_token_to_image: SamAttention::new(config, rate, final_attn)?,
            layer_norm_final_attn: LayerNorm::load(config.hidden_size, FINAL_EPS, norm)?,
        })
    }

    /// What the first layer takes from images `[B, h w, C]` with positions `[1, h w, C]`: the same for all prompts, in evaluation.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn share(&self, image: &Tensor, positions: &Tensor, mode: Mode) -> Result<SharedImage> {
        // In training every prompt has dropout of its own on the image's projections.
        let first = self.layers.first().filter(|_| mode == Mode::Eval);
        Ok(SharedImage {
            image: image.clone(),
            positions: positions.clone(),
            first: first.map(|layer| layer.share(image, positions, mode)).transpose()?,
        })
    }

    /// Tokens `[B P, N, C]`, P prompts of each of B images -> new tokens and images `[B P, h w, C]`.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn forward(
        &self,
        tokens: &Tensor,
        images: &SharedImage,
        mode: Mode,
    ) -> Result<(Tensor, Tensor)> {
        let batch = images.image.dim(0)?;
        let prompts = tokens.dim(0)? / batch.max(1);
        if prompts * batch != tokens.dim(0)? {
            bail!("mask_decoder: {} groups of tokens for {batch} images", tokens.dim(0)?)
        }
        let (mut queries, mut keys) = (tokens.clone(), repeat_for(&images.image, prompts)?);
        for (index, layer) in self.layers.iter().enumerate() {
            let image = match (index, &images.first) {
                (0, Some(first)) => first.repeat(prompts)?,
                _ => layer.share(&keys, &images.positions, mode)?,
            };
            (queries, keys) = layer.forward(&queries, &keys, tokens, &image, mode)?;
        }
        let placed = (&queries + tokens)?;
        let placed_keys = ops::broadcast_add(&keys, &images.positions)?;
        let attention = &self.final_attn_token_to_image;
        let queries = attention.forward([&placed, &placed_keys, &keys], Some(&queries), mode)?;
        Ok((self.layer_norm_final_attn.forward(&queries)?, keys))
    }
}
