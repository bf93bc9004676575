//! The image encoder's attention: the trait that a layer asks for, and the two of ours.
//!
//! ```text
//! SamVisionAttention        qkv = x W_qkv^T + b_qkv                 one Linear, as in the checkpoints
//! SamVisionAttentionSplit   qkv = [x W_q^T + b_q | x W_k^T + b_k | x W_v^T + b_v]    three, each to be adapted
//! out = proj(rel_pos_attention(qkv))                                x, out [B, H, W, C]
//! ```
//!
//! Both compute the same: `W_q`, `W_k` and `W_v` are the row blocks of `W_qkv`. An attention sees the whole grid and
//! knows its window, instead of being handed padded windows: ours never builds any. SAM pads *after* the layer norm. So
//! a padded token is zero before the projection and the projection's bias after it, which is all that the operation has
//! to know. A user's attention that wants windows takes them from [`in_windows`].
//!
//! Source: `SamVisionAttention`, `SamVisionLayer` in `modeling_sam.py`.

use super::validate::require_dtype;
use super::SamVisionConfig;
use crate::nn::{LayerNorm, Linear, Mode, ModuleTree};
use crate::ops::{self, composed, Activation, RelPosAttention};
use crate::{module_tree, philox};
use candle_core::{bail, Result, Tensor, D};
use candle_nn::VarBuilder;
use dyn_clone::DynClone;
use std::any::Any;
use std::fmt::Debug;

/// Attention of one layer of the image encoder. `Any` lets a user get the own type back from the encoder:
/// `(layer.attn.as_ref() as &dyn Any).downcast_ref::<Mine>()`. A clone shares its tensors with the original;
/// `#[derive(Clone)]` does that.
///
/// [Example](crate::guide::hack_your_own)
#[diagnostic::on_unimplemented(
    message = "`{Self}` is no attention of a SAM's image encoder",
    note = "implement `VisionAttention::forward` for it, and its names with `candle_sam_lora::module_tree!`; it must be `Clone + Debug + Send + Sync`"
)]
pub trait VisionAttention: ModuleTree + DynClone + Any + Debug + Send + Sync {
    /// From the layer-normed tokens, the whole unpadded grid: `[B, H, W, C] -> [B, H, W, C]`
    fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor>;

    /// `x + forward(norm(x))`, what the layer calls, from tokens before the layer norm; an attention that can do that
    /// as one operation says so here.
    fn forward_normed(&self, x: &Tensor, norm: &LayerNorm, mode: Mode) -> Result<Tensor> {
        x + self.forward(&norm.forward(x)?, mode)?
    }

    /// `forward` and the attention weights `[B * windows * heads, N, N]`, before dropout; N is the number of tokens
    /// of a window, padded ones included, or of the grid.
    ///
    /// # Errors
    /// When this attention cannot give its weights, as is the default.
    fn forward_with_weights(&self, _x: &Tensor, _mode: Mode) -> Result<(Tensor, Tensor)> {
        bail!("output_attentions: this attention does not give its weights: {self:?}")
    }
}

dyn_clone::clone_trait_object!(VisionAttention);

/// The parts that an attention is built from: the configuration, the place in the encoder, and its tensors.
///
/// [Example](crate::guide::hack_your_own)
#[derive(Clone)]
pub struct LayerContext<'a> {
    /// The encoder's configuration.
    pub config: &'a SamVisionConfig,
    /// Which layer, from 0.
    pub index: usize,
    /// The attention's dotted name in a [`SamModel`](super::SamModel), from which its dropout masks are derived.
    pub name: String,
    /// The attention's tensors, their dtype and device.
    pub vb: VarBuilder<'a>,
}

impl Debug for LayerContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { config, index, name, vb } = self;
        f.debug_struct("LayerContext")
            .field("config", config)
            .field("index", index)
            .field("name", name)
            .field("vb", &vb.prefix())
            .finish()
    }
}

impl<'a> LayerContext<'a> {
    pub(super) fn new(config: &'a SamVisionConfig, index: usize, vb: VarBuilder<'a>) -> Self {
        let name = format!("vision_encoder.layers.{index}.attn");
        Self { config, index, name, vb }
    }

    /// Side of the layer's square windows; none for global attention.
    pub fn window(&self) -> Option<usize> {
        self.config.window(self.index)
    }

    /// The projection `[C] -> [out_dim]` called `name`.
    pub fn linear(&self, name: &str, out_dim: usize, bias: bool) -> Result<Linear> {
        let load = if bias { Linear::load } else { Linear::load_no_bias };
        load(self.config.hidden_size, out_dim, self.vb.pp(name))
    }
}

/// Which of our attentions an encoder gets in every layer.
///
/// [Example](crate::sam)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionKind {
    /// [`SamVisionAttention`]: one `qkv`, as checkpoints have it.
    Fused,
    /// [`SamVisionAttentionSplit`]: `q`, `k` and `v`, as LoRA wants them.
    #[default]
    Split,
}

impl AttentionKind {
    /// The attention of one layer.
    pub fn build(self, layer: &LayerContext<'_>) -> Result<Box<dyn VisionAttention>> {
        Ok(match self {
            Self::Fused => Box::new(SamVisionAttention::new(layer)?),
            Self::Split => Box::new(SamVisionAttentionSplit::new(layer)?),
        })
    }
}

/// The part between the projections: softmax attention with the layer's tables, window and dropout.
///
/// [Example](crate::guide::hack_your_own)
#[derive(Clone, Debug)]
pub struct RelPosCore {
    /// `[2 side - 1, head_dim]`, side of the window or the grid; none without relative positions.
    pub rel_pos_h: Option<Tensor>,
    /// As `rel_pos_h`.
    pub rel_pos_w: Option<Tensor>,
    /// Number of heads.
    pub num_heads: usize,
    /// Side of the square windows; none for global attention.
    pub window: Option<usize>,
    /// Dropout probability of the attention weights.
    pub dropout: f64,
    /// Stream of the dropout masks.
    pub stream: u32,
}

module_tree!(RelPosCore { rel_pos_h, rel_pos_w });

impl RelPosCore {
    /// With the tables of a layer, `rel_pos_h` and `rel_pos_w`.
    ///
    /// # Errors
    /// - the configuration is impossible;
    /// - the dtype is none of f32, f16 and bf16;
    /// - a table is missing or has another shape.
    pub fn new(layer: &LayerContext<'_>) -> Result<Self> {
        let config = layer.config;
        config.validate()?;
        require_dtype(layer.vb.dtype())?;
        let table = |name| {
            let dims = (config.rel_pos_len(layer.index), config.head_dim());
            config.use_rel_pos.then(|| layer.vb.get(dims, name)).transpose()
        };
        Ok(Self {
            rel_pos_h: table("rel_pos_h")?,
            rel_pos_w: table("rel_pos_w")?,
            num_heads: config.num_attention_heads,
            window: layer.window(),
            dropout: config.attention_dropout,
            stream: philox::stream_of(&layer.name),
        })
    }

    /// True when the last windows hang over the grid of `x [B, H, W, C]`, so that padded tokens take part.
    pub fn pads(&self, x: &Tensor) -> bool {
        let side = self.window.unwrap_or(1).max(1);
        matches!(x.dims(), &[_, h, w, _] if h % side != 0 || w % side != 0)
    }

    /// `[B, H, W, 3C] -> [B, H, W, C]`; `pad [3C]` is what a padded token is projected to, none zero.
    pub fn forward(&self, qkv: &Tensor, pad: Option<&Tensor>, mode: Mode) -> Result<Tensor> {
        let tables = self.rel_pos_h.as_ref().zip(self.rel_pos_w.as_ref());
        ops::rel_pos_attention(qkv, &self.config(qkv.dim(D::Minus1)?, tables, pad, mode))
    }

    /// As `forward`, with the weights `[B * windows * heads, N, N]`; the one path that builds them.
    pub fn forward_with_weights(
        &self,
        qkv: &Tensor,
        pad: Option<&Tensor>,
        mode: Mode,
    ) -> Result<(Tensor, Tensor)> {
        let (_, h, w, _) = qkv.dims4()?;
        let resized = |table: &Option<Tensor>, side: usize| {
            let length = (2 * self.window.unwrap_or(side)).saturating_sub(1);
            table.as_ref().map(|table| ops::resize_linear(table, length)).transpose()
        };
        let (rel_pos_h, rel_pos_w) = (resized(&self.rel_pos_h, h)?, resized(&self.rel_pos_w, w)?);
        let tables = rel_pos_h.as_ref().zip(rel_pos_w.as_ref());
        let config = self.config(qkv.dim(D::Minus1)?, tables, pad, mode);
        let (out, weights) = composed::rel_pos_attention(qkv, &config)?;
        Ok((out, weights.flatten(0, 1)?))
    }

    /// The operation's settings for q, k and v that are `packed` wide together.
    fn config<'a>(
        &self,
        packed: usize,
        rel_pos: Option<(&'a Tensor, &'a Tensor)>,
        pad: Option<&'a Tensor>,
        mode: Mode,
    ) -> RelPosAttention<'a> {
        let head_dim = packed / 3 / self.num_heads.max(1);
        RelPosAttention {
            num_heads: self.num_heads,
            softmax_scale: (head_dim as f64).powf(-0.5),
            rel_pos,
            window: self.window,
            pad,
            dropout: mode.dropout(self.dropout, self.stream),
        }
    }
}

/// SAM's attention with the fused `qkv` projection of its checkpoints.
///
/// [Example](crate::guide::hack_your_own)
#[derive(Clone, Debug)]
pub struct SamVisionAttention {
    /// The attention proper, with the tables.
    pub core: RelPosCore,
    /// `[C] -> [3C]`: q, k, v.
    pub qkv: Linear,
    /// `[C] -> [C]`
    pub proj: Linear,
}

module_tree!(SamVisionAttention { core => "", qkv, proj });

impl SamVisionAttention {
    /// With the tensors of a layer.
    ///
    /// # Errors
    /// As [`RelPosCore::new`].
    pub fn new(layer: &LayerContext<'_>) -> Result<Self> {
        let size = layer.config.hidden_size;
        Ok(Self {
            core: RelPosCore::new(layer)?,
            qkv: layer.linear("qkv", 3 * size, layer.config.qkv_bias)?,
            proj: layer.linear("proj", size, true)?,
        })
    }

    fn parts(&self) -> [&Linear; 1] {
        [&self.qkv]
    }

    /// The packed q, k, v of the tokens, `[B, H, W, 3C]`, and of a padded token, `[3C]`.
    fn project(&self, x: &Tensor, mode: Mode) -> Result<(Tensor, Option<Tensor>)> {
        Ok((self.qkv.forward(x, mode)?, self.pad(x, mode)?))
    }

    /// q, k and v of a padded token, `[3C]`; none where no padded token takes part, or all are zero.
    fn pad(&self, x: &Tensor, mode: Mode) -> Result<Option<Tensor>> {
        if !self.core.pads(x) {
            return Ok(None);
        }
        let pad = self.qkv.output_at_zero(mode)?;
        pad.map(|pad| pad.to_dtype(x.dtype())).transpose()
    }
}

/// SAM's attention with `q`, `k` and `v` as layers of their own, so that LoRA can adapt each.
///
/// [Example](crate::guide::hack_your_own)
#[derive(Clone, Debug)]
pub struct SamVisionAttentionSplit {
    /// The attention proper, with the tables.
    pub core: RelPosCore,
    /// `[C] -> [C]`
    pub q: Linear,
    /// `[C] -> [C]`
    pub k: Linear,
    /// `[C] -> [C]`
    pub v: Linear,
    /// `[C] -> [C]`
    pub proj: Linear,
}

module_tree!(SamVisionAttentionSplit { core => "", q, k, v, proj });

impl SamVisionAttentionSplit {
    /// With the tensors of a layer.
    ///
    /// # Errors
    /// As [`RelPosCore::new`].
    pub fn new(layer: &LayerContext<'_>) -> Result<Self> {
        let size = layer.config.hidden_size;
        let projection = |name| layer.linear(name, size, layer.config.qkv_bias);
        Ok(Self {
            core: RelPosCore::new(layer)?,
            q: projection("q")?,
            k: projection("k")?,
            v: projection("v")?,
            proj: layer.linear("proj", size, true)?,
        })
    }

    fn parts(&self) -> [&Linear; 3] {
        [&self.q, &self.k, &self.v]
    }

    /// The packed q, k, v of the tokens, `[B, H, W, 3C]`, and of a padded token, `[3C]`.
    fn project(&self, x: &Tensor, mode: Mode) -> Result<(Tensor, Option<Tensor>)> {
        let parts = self.parts();
        let low_rank = [self.q.low_rank(mode)?, self.k.low_rank(mode)?, self.v.low_rank(mode)?];
        let [q, k, v] = &low_rank;
        let projections = (self.q.projection(q), self.k.projection(k), self.v.projection(v));
        let qkv = match projections {
            (Some(q), Some(k), Some(v)) => ops::lora_qkv(x, &[q, k, v])?,
            // Some output is no sum of base and low-rank part, as with DoRA.
            _ => {
                let outputs = parts.map(|part| part.forward(x, mode));
                Tensor::cat(&outputs.into_iter().collect::<Result<Vec<_>>>()?, D::Minus1)?
            }
        };
        Ok((qkv, self.pad(x, mode)?))
    }

    /// q, k and v of a padded token, `[3C]`; none where no padded token takes part, or all are zero.
    fn pad(&self, x: &Tensor, mode: Mode) -> Result<Option<Tensor>> {
        if !self.core.pads(x) {
            return Ok(None);
        }
        let parts = self.parts();
        let outputs =
            parts.iter().map(|part| part.output_at_zero(mode)).collect::<Result<Vec<_>>>()?;
        if outputs.iter().all(Option::is_none) {
            return Ok(None);
        }
        let filled = outputs.into_iter().zip(parts).map(|(output, part)| {
            let (dtype, device) = (x.dtype(), part.weight.device());
            let zeros = || Tensor::zeros(part.out_dim(), dtype, device);
            output.map_or_else(zeros, |output| output.to_dtype(dtype))
        });
        ops::concat(&filled.collect::<Result<Vec<_>>>()?).map(Some)
    }
}

/// Both of ours are projections around the core.
macro_rules! projections_around_the_core {
    ($attention:ty) => {
        impl $attention {
            /// Everything but the last projection, `[B, H, W, C] -> [B, H, W, C]`: what to build upon.
            pub fn attend(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
                let (qkv, pad) = self.project(x, mode)?;
                self.core.forward(&qkv, pad.as_ref(), mode)
            }
        }

        impl VisionAttention for $attention {
            fn forward(&self, x: &Tensor, mode: Mode) -> Result<Tensor> {
                self.run(x, None, mode)
            }

            fn forward_normed(&self, x: &Tensor, norm: &LayerNorm, mode: Mode) -> Result<Tensor> {
                self.run(x, Some(norm), mode)
            }

            fn forward_with_weights(&self, x: &Tensor, mode: Mode) -> Result<(Tensor, Tensor)> {
                let (qkv, pad) = self.project(x, mode)?;
                let (out, weights) = self.core.forward_with_weights(&qkv, pad.as_ref(), mode)?;
                Ok((self.proj.forward(&out, mode)?, weights))
            }
        }

        impl $attention {
            /// The attention of x, or with a norm x plus the attention of the normed x.
            fn run(&self, x: &Tensor, norm: Option<&LayerNorm>, mode: Mode) -> Result<Tensor> {
                let parts = self.parts();
                let low_rank = parts.iter().map(|part| part.low_rank(mode));
                let low_rank = low_rank.collect::<Result<Vec<_>>>()?;
                let proj_low_rank = self.proj.low_rank(mode)?;
                let qkv = parts.iter().zip(&low_rank).map(|(part, lora)| part.projection(lora));
                let (Some(qkv), Some(proj)) =
                    (qkv.collect::<Option<Vec<_>>>(), self.proj.projection(&proj_low_rank))
                else {
                    // Some output is no sum of base and low-rank part, as with DoRA.
                    let normed = norm.map_or_else(|| Ok(x.clone()), |norm| norm.forward(x))?;
                    let (out, residual) = (self.attend(&normed, mode)?, norm.map(|_| x));
                    return self.proj.forward_fused(&out, Activation::Identity, residual, mode);
                };
                let tables = self.core.rel_pos_h.as_ref().zip(self.core.rel_pos_w.as_ref());
                let pad = self.pad(x, mode)?;
                let packed = parts.iter().map(|part| part.out_dim()).sum();
                let config = self.core.config(packed, tables, pad.as_ref(), mode);
                match norm {
                    Some(norm) => ops::attention_block(x, &norm.parameters(), &qkv, &config, &proj),
                    None => ops::attention_layer(x, &qkv, &config, &proj),
                }
            }
        }
    };
}

projections_around_the_core!(SamVisionAttention);
projections_around_the_core!(SamVisionAttentionSplit);

/// Runs `attention` on the windows of a grid, as Hugging Face's layer runs its own. The grid is zero-padded after the
/// layer norm, partitioned to `[B * windows, side, side, C]`, put together again, and cropped. Without a window, on the
/// grid.
///
/// [Example](crate::guide::hack_your_own)
pub fn in_windows(
    x: &Tensor,
    window: Option<usize>,
    attention: impl FnOnce(&Tensor) -> Result<Tensor>,
) -> Result<Tensor> {
    let Some(side) = window else { return attention(x) };
    if side == 0 {
        bail!("in_windows: the window must be positive; none is global attention")
    }
    let (batch, h, w, _) = x.dims4()?;
    let windows = composed::partition(x, side, None)?;
    let out = attention(&windows)?;
    if out.dims()[..out.rank().min(3)] != windows.dims()[..3] {
        bail!(
            "in_windows: an attention over {:?} must keep windows and tokens, got {:?}",
            windows.dims(),
            out.dims()
        )
    }
    composed::unpartition(&out, side, (batch, h, w))
}
