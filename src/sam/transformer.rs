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
use crate::nn::{LayerNorm, Linear, LowRank, MlpBlock, Mode};
use crate::ops::image_side::{self, CrossAttention, Image};
use crate::ops::{self, Activation};
use candle_core::{bail, DType, Result, Tensor, D};
use candle_nn::VarBuilder;

/// Epsilon of the final norm: torch's default, where all others have the configuration's.
const FINAL_EPS: f64 = 1e-5;

/// Prompts of an image from which on its projections are worth computing once for all: fewer absorb them.
const SHARED_FROM: usize = 3;

/// Multi-head attention inside `hidden_size / downsample_rate` channels.
///
/// [Example](crate::sam::SamMaskDecoder)
#[derive(Clone, Debug)]
pub struct SamAttention {
    /// Projection of the queries.
    pub q_proj: Linear,
    /// Projection of the keys.
    pub k_proj: Linear,
    /// Projection of the values.
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
        let q = self.q_proj.forward(q, mode)?;
        let k = self.k_proj.forward(k, mode)?;
        let v = self.v_proj.forward(v, mode)?;
        let attended = self.attend(&q, [&k, &v])?;
        self.out_proj.forward_fused(&attended, Activation::Identity, residual, mode)
    }

    /// Projected `q [G or 1, N, inner]`, `k` and `v [G or 1, M, inner]` -> `[G, N, inner]` in q's dtype; k and v may be
    /// in f32 beside q in 16 bits.
    fn attend(&self, q: &Tensor, kv: [&Tensor; 2]) -> Result<Tensor> {
        let head_dim = q.dim(D::Minus1)? / self.num_heads;
        let attend = |q: &Tensor| {
            ops::multi_head_attention(q, kv, self.num_heads, (head_dim as f64).powf(-0.5))
        };
        let wide = q.to_dtype(kv[0].dtype())?;
        // Keys that all share: all queries are those of one entry, and fill vectors together.
        let attended = match kv[0].dim(0)? == 1 {
            true => attend(&wide.flatten(0, 1)?.unsqueeze(0)?)?.reshape(q.shape())?,
            false => attend(&wide)?,
        };
        attended.to_dtype(q.dtype())
    }

    /// Calls `f` with the attention as one between an image and tokens. None with adapters that are no single sum.
    fn with_image(
        &self,
        mode: Mode,
        f: impl FnOnce(&CrossAttention<'_>) -> Result<Option<Tensor>>,
    ) -> Result<Option<Tensor>> {
        let parts = [&self.q_proj, &self.k_proj, &self.v_proj, &self.out_proj];
        let [q, k, v, out] = parts.map(|part| part.low_rank(mode));
        let low_rank = [q?, k?, v?, out?];
        let projection = |i: usize| parts[i].projection(&low_rank[i]);
        match (projection(0), projection(1), projection(2), projection(3)) {
            (Some(q), Some(k), Some(v), Some(out)) => {
                let projections = [&q, &k, &v, &out];
                f(&CrossAttention { projections, num_heads: self.num_heads })
            }
            _ => Ok(None),
        }
    }
}

/// One two-way layer.
///
/// [Example](crate::sam::SamMaskDecoder)
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
    /// MLP of the tokens.
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

    /// Whether adapters drop parts of the image, differently for each prompt.
    fn drops_image(&self, mode: Mode) -> Result<bool> {
        for linear in self.of_image() {
            if linear.low_rank(mode)?.iter().any(LowRank::drops) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// The projections k, v and q of the image.
    fn of_image(&self) -> [&Linear; 3] {
        let (to_image, to_tokens) =
            (&self.cross_attn_token_to_image, &self.cross_attn_image_to_token);
        [&to_image.k_proj, &to_image.v_proj, &to_tokens.q_proj]
    }

    /// Heads of the image that several prompts share.
    fn share(&self, image: &Tensor, positions: &Tensor, mode: Mode) -> Result<SharedHeads> {
        let placed = ops::broadcast_add(image, &positions.to_dtype(image.dtype())?)?;
        let [k, v, q] = self.of_image();
        Ok(SharedHeads {
            k: k.forward(&placed, mode)?,
            v: v.forward(image, mode)?,
            q: q.forward(&placed, mode)?,
        })
    }

    /// New queries, and new rows of the image, which may be in f32 beside queries in 16 bits.
    fn forward(
        &self,
        queries: &Tensor,
        query_positions: &Tensor,
        image: &ImageTokens<'_>,
        mode: Mode,
    ) -> Result<(Tensor, Tensor)> {
        let groups = queries.dim(0)?;
        let queries = if self.skip_first_layer_pe {
            self.self_attn.forward([queries, queries, queries], None, mode)?
        } else {
            let placed = (queries + query_positions)?;
            self.self_attn.forward([&placed, &placed, queries], Some(queries), mode)?
        };
        let queries = self.layer_norm1.forward(&queries)?;

        let placed = (&queries + query_positions)?;
        let to_image = &self.cross_attn_token_to_image;
        let q = to_image.q_proj.forward(&placed, mode)?;
        let (attended, heads) = match image.absorbed(to_image, &q, mode)? {
            Some(attended) => (attended, None),
            None => {
                let heads = match image.heads {
                    Some(heads) => heads.clone(),
                    None => {
                        let rows = image.plain_rows(groups, queries.dtype(), mode)?;
                        self.share(&rows, image.positions, mode)?
                    }
                };
                let [k, v] = [several_for(&heads.k, groups)?, several_for(&heads.v, groups)?];
                (to_image.attend(&q, [&k, &v])?, Some(heads))
            }
        };
        let out_proj = &to_image.out_proj;
        let queries =
            out_proj.forward_fused(&attended, Activation::Identity, Some(&queries), mode)?;
        let queries = self.layer_norm2.forward(&queries)?;

        let queries =
            self.layer_norm3.forward(&self.mlp.forward_onto(&queries, Some(&queries), mode)?)?;

        let placed = (&queries + query_positions)?;
        let to_tokens = &self.cross_attn_image_to_token;
        let k = to_tokens.k_proj.forward(&placed, mode)?;
        let v = to_tokens.v_proj.forward(&queries, mode)?;
        let q = heads.map(|heads| heads.q);
        let (rows, positions) = (image.rows, image.positions);
        let entries = rows.dim(0)?;
        let fused = to_tokens.with_image(mode, |attention| {
            let q = q.as_ref().filter(|q| q.dims()[0] == entries);
            let image = Image { rows, positions, q };
            let norm = self.layer_norm4.parameters();
            image_side::image_to_tokens(&image, [&k, &v], attention, &norm)
        })?;
        if let Some(rows) = fused {
            return Ok((queries, rows));
        }
        let rows = &image.plain_rows(groups, queries.dtype(), mode)?;
        let q = match q {
            Some(q) => several_for(&q.to_dtype(rows.dtype())?, groups)?,
            None => {
                let positions = positions.to_dtype(rows.dtype())?;
                to_tokens.q_proj.forward(&ops::broadcast_add(rows, &positions)?, mode)?
            }
        };
        let attended = to_tokens.attend(&q, [&k, &v])?;
        let residual = repeat_for(rows, attended.dim(0)? / rows.dim(0)?)?;
        let out_proj = &to_tokens.out_proj;
        let rows =
            out_proj.forward_fused(&attended, Activation::Identity, Some(&residual), mode)?;
        Ok((queries, self.layer_norm4.forward(&rows)?))
    }
}

/// The image as a layer sees it.
struct ImageTokens<'a> {
    /// `[B or G, h w, C]`
    rows: &'a Tensor,
    /// `[1, h w, C]`
    positions: &'a Tensor,
    /// The layer's projections, where they are there already.
    heads: Option<&'a SharedHeads>,
}

impl ImageTokens<'_> {
    /// The rows as the plain order of products takes them, in the dtype of the tokens: one image for all groups, or one
    /// for each. In training each has its own, since dropout counts rows.
    fn plain_rows(&self, groups: usize, dtype: DType, mode: Mode) -> Result<Tensor> {
        let rows = self.rows.to_dtype(dtype)?;
        match (rows.dim(0)?, mode) {
            (1, Mode::Eval) => Ok(rows),
            (entries, _) => repeat_for(&rows, groups / entries.max(1)),
        }
    }

    /// Projected queries look at the image, which is not projected; none where that does not apply.
    fn absorbed(&self, attention: &SamAttention, q: &Tensor, mode: Mode) -> Result<Option<Tensor>> {
        if self.heads.is_some() {
            return Ok(None);
        }
        let image = Image { rows: self.rows, positions: self.positions, q: None };
        attention.with_image(mode, |attention| image_side::tokens_to_image(q, &image, attention))
    }
}

/// Projections of the image, `[G, h w, inner]`: what tokens look at, and what looks at tokens.
#[derive(Clone, Debug)]
struct SharedHeads {
    k: Tensor,
    v: Tensor,
    q: Tensor,
}

/// Entries of an image `[B, ..]` for each of its prompts `[B P, ..]`; a single one serves all prompts as it is.
fn several_for(image: &Tensor, groups: usize) -> Result<Tensor> {
    match image.dim(0)? {
        1 => Ok(image.clone()),
        entries => repeat_for(image, groups / entries.max(1)),
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
///
/// [Example](crate::sam::SamMaskDecoder)
#[derive(Clone, Debug)]
pub struct SharedImage {
    image: Tensor,
    positions: Tensor,
    first: Option<SharedHeads>,
}

impl SharedImage {
    /// Added to the images, `[1, h w, C]`.
    pub(super) fn positions(&self) -> &Tensor {
        &self.positions
    }

    /// The images from `first` on.
    pub(super) fn narrow(&self, first: usize, count: usize) -> Result<Self> {
        self.map_images(|x| x.narrow(0, first, count))
    }

    /// `f` of every tensor of the images.
    fn map_images(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let heads = |SharedHeads { k, v, q }: &SharedHeads| {
            Ok::<_, candle_core::Error>(SharedHeads { k: f(k)?, v: f(v)?, q: f(q)? })
        };
        let first = self.first.as_ref().map(heads).transpose()?;
        Ok(Self { image: f(&self.image)?, positions: self.positions.clone(), first })
    }
}

/// The layers and a last look of the tokens at the image.
///
/// [Example](crate::sam::SamMaskDecoder)
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

    /// Heads of the first layer that all `prompts` of an image share, unless adapters drop. Images are `[B, h w, C]`,
    /// positions `[1, h w, C]`. Without gradients on the CPU, 16 bits are widened here, once for all prompts.
    ///
    /// # Errors
    /// When shapes do not fit.
    pub fn share(
        &self,
        image: &Tensor,
        positions: &Tensor,
        prompts: usize,
        mode: Mode,
    ) -> Result<SharedImage> {
        let first = match self.layers.first() {
            Some(layer) if prompts >= SHARED_FROM && !layer.drops_image(mode)? => Some(layer),
            _ => None,
        };
        let first = first.map(|layer| layer.share(image, positions, mode)).transpose()?;
        let shared = SharedImage { image: image.clone(), positions: positions.clone(), first };
        if mode != Mode::Eval || !image.device().is_cpu() {
            return Ok(shared);
        }
        let positions = positions.to_dtype(DType::F32)?;
        Ok(SharedImage { positions, ..shared.map_images(|x| x.to_dtype(DType::F32))? })
    }

    /// Every tensor that [`share`](Self::share) reads in evaluation.
    pub(super) fn shared_reads(&self) -> Result<Vec<Tensor>> {
        let linears = self.layers.first().map(SamTwoWayAttentionBlock::of_image);
        let reads = linears.into_iter().flatten().map(Linear::reads).collect::<Result<Vec<_>>>()?;
        Ok(reads.concat())
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
        let (queries, rows) = self.layers(tokens, images, mode)?;
        let queries = self.last_look([&queries, tokens], (&rows, &images.positions), mode)?;
        Ok((queries, rows))
    }

    /// As [`forward`](Self::forward), before the last look.
    pub(super) fn layers(
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
        let mut queries = tokens.clone();
        let mut rows = images.image.clone();
        let positions = &images.positions;
        for (index, layer) in self.layers.iter().enumerate() {
            let heads = images.first.as_ref().filter(|_| index == 0);
            let image = ImageTokens { rows: &rows, positions, heads };
            (queries, rows) = layer.forward(&queries, tokens, &image, mode)?;
        }
        // Without a layer an image still serves all its prompts.
        let rows = repeat_for(&rows, tokens.dim(0)? / rows.dim(0)?)?;
        Ok((queries, rows))
    }

    /// The tokens look at the image once more, each for itself: `queries` after the layers, and as they came.
    pub(super) fn last_look(
        &self,
        [queries, tokens]: [&Tensor; 2],
        (rows, positions): (&Tensor, &Tensor),
        mode: Mode,
    ) -> Result<Tensor> {
        let placed = (queries + tokens)?;
        let attention = &self.final_attn_token_to_image;
        let q = attention.q_proj.forward(&placed, mode)?;
        let image = ImageTokens { rows, positions, heads: None };
        let attended = match image.absorbed(attention, &q, mode)? {
            Some(attended) => attended,
            None => {
                let rows = rows.to_dtype(queries.dtype())?;
                let placed = ops::broadcast_add(&rows, &positions.to_dtype(rows.dtype())?)?;
                let k = attention.k_proj.forward(&placed, mode)?;
                attention.attend(&q, [&k, &attention.v_proj.forward(&rows, mode)?])?
            }
        };
        let out_proj = &attention.out_proj;
        let queries =
            out_proj.forward_fused(&attended, Activation::Identity, Some(queries), mode)?;
        self.layer_norm_final_attn.forward(&queries)
    }
}
