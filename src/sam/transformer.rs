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
use candle_core::{bail, DType, Device, Result, Tensor, D};

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
    fn zeros(
        config: &SamMaskDecoderConfig,
        downsample_rate: usize,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (size, heads) = (config.hidden_size, config.num_attention_heads);
        let inner = size / downsample_rate.max(1);
        if heads == 0 || !inner.is_multiple_of(heads) {
            bail!("mask_decoder: {heads} attention heads do not divide {inner} channels")
        }
        let down = || Linear::zeros(size, inner, true, dtype, device);
        Ok(Self {
            q_proj: down()?,
            k_proj: down()?,
            v_proj: down()?,
            out_proj: Linear::zeros(inner, size, true, dtype, device)?,
            num_heads: heads,
        })
    }

    /// `q [G, N, C]`, `k` and `v [G, M, C]` -> `residual + attention`, `[G, N, C]`
    pub fn forward(
        &self,
        [q, k, v]: [&Tensor; 3],
        residual: Option<&Tensor>,
        mode: Mode,
    ) -> Result<Tensor> {
        let heads = |x: Tensor| {
            let (groups, tokens, channels) = x.dims3()?;
            x.reshape((groups, tokens, self.num_heads, channels / self.num_heads))?
                .transpose(1, 2)?
                .contiguous()
        };
        let q = heads(self.q_proj.forward(q, mode)?)?;
        let k = heads(self.k_proj.forward(k, mode)?)?;
        let v = heads(self.v_proj.forward(v, mode)?)?;
        let softmax_scale = (q.dim(D::Minus1)? as f64).powf(-0.5);
        let scores = (ops::matmul(&q, &k.t()?)? * softmax_scale)?.to_dtype(DType::F32)?;
        let weights = candle_nn::ops::softmax(&scores, D::Minus1)?.to_dtype(v.dtype())?;
        let out = ops::matmul(&weights, &v)?.transpose(1, 2)?.flatten_from(2)?;
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
    fn zeros(
        config: &SamMaskDecoderConfig,
        skip_first_layer_pe: bool,
        dtype: DType,
        device: &Device,
    ) -> Result<Self> {
        let (size, rate) = (config.hidden_size, CROSS_DOWNSAMPLE_RATE);
        let norm = || LayerNorm::new(size, config.layer_norm_eps, dtype, device);
        let activation = config.hidden_act.into();
        Ok(Self {
            self_attn: SamAttention::zeros(config, 1, dtype, device)?,
            layer_norm1: norm()?,
            cross_attn_token_to_image: SamAttention::zeros(config, rate, dtype, device)?,
            layer_norm2: norm()?,
            mlp: MlpBlock::zeros(size, config.mlp_dim, activation, dtype, device)?,
            layer_norm3: norm()?,
            layer_norm4: norm()?,
            cross_attn_image_to_token: SamAttention::zeros(config, rate, dtype, device)?,
            skip_first_layer_pe,
        })
    }

    /// Queries and keys, each with its positions, to new queries and keys.
    fn forward(
        &self,
        queries: &Tensor,
        keys: &Tensor,
        query_positions: &Tensor,
        key_positions: &Tensor,
        mode: Mode,
    ) -> Result<(Tensor, Tensor)> {
        let queries = if self.skip_first_layer_pe {
            self.self_attn.forward([queries, queries, queries], None, mode)?
        } else {
            let placed = (queries + query_positions)?;
            self.self_attn.forward([&placed, &placed, queries], Some(queries), mode)?
        };
        let queries = self.layer_norm1.forward(&queries)?;

        let placed_keys = ops::broadcast_add(keys, key_positions)?;
        let placed = (&queries + query_positions)?;
        let to_image = &self.cross_attn_token_to_image;
        let queries = to_image.forward([&placed, &placed_keys, keys], Some(&queries), mode)?;
        let queries = self.layer_norm2.forward(&queries)?;

        let queries = self.layer_norm3.forward(&self.mlp.forward(&queries, &queries, mode)?)?;

        let placed = (&queries + query_positions)?;
        let to_tokens = &self.cross_attn_image_to_token;
        let keys = to_tokens.forward([&placed_keys, &placed, &queries], Some(keys), mode)?;
        Ok((queries, self.layer_norm4.forward(&keys)?))
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
    /// All zero.
    ///
    /// # Errors
    /// When the heads do not divide the channels, or the dtype is none of f32, f16 and bf16.
    pub fn zeros(config: &SamMaskDecoderConfig, dtype: DType, device: &Device) -> Result<Self> {
        require_dtype(dtype)?;
        let rate = config.attention_downsample_rate;
        Ok(Self {
            layers: (0..config.num_hidden_layers)
                .map(|i| SamTwoWayAttentionBlock::zeros(config, i == 0, dtype, device))
                .collect::<Result<_>>()?,
            final_attn_token_to_image: SamAttention::zeros(config, rate, dtype, device)?,
            layer_norm_final_attn: LayerNorm::new(config.hidden_size, FINAL_EPS, dtype, device)?,
        })
    }

    /// Tokens `[G, N, C]`, image `[G, h w, C]` and its positions `[1, h w, C]` -> new tokens and image.
    pub fn forward(
        &self,
        tokens: &Tensor,
        image: &Tensor,
        image_positions: &Tensor,
        mode: Mode,
    ) -> Result<(Tensor, Tensor)> {
        let (mut queries, mut keys) = (tokens.clone(), image.clone());
        for layer in &self.layers {
            (queries, keys) = layer.forward(&queries, &keys, tokens, image_positions, mode)?;
        }
        let placed = (&queries + tokens)?;
        let placed_keys = ops::broadcast_add(&keys, image_positions)?;
        let attention = &self.final_attn_token_to_image;
        let queries = attention.forward([&placed, &placed_keys, &keys], Some(&queries), mode)?;
        Ok((self.layer_norm_final_attn.forward(&queries)?, keys))
    }
}
