//! The image side of the mask decoder on the CPU. Nothing of the image's size is in memory but the output, and in a
//! backward the gradient of the rows.
//!
//! Each function returns none on another device, and for adapters that drop or are no single sum. It also returns none
//! for so many tokens that the plain order of products is cheaper. Then
//! [`multi_head_attention`](super::multi_head_attention) and the projections compute the same.

use super::absorbed::{self, Merged, UpscaleShape};
use super::custom::{from_f32, with_f32};
use super::{params, Norm, Projection};
use crate::cpu::image_side::{self as cpu, Absorbed, Output, Scored, Shape};
use crate::cpu::simd::MAX_LANES;
use crate::cpu::upscale::{masks, Upscale};
use candle_core::op::BackpropOp;
use candle_core::{DType, Device, Result, Storage, Tensor};

const OP: &str = "image-side";

/// The attention between an image and tokens.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CrossAttention<'a> {
    /// Projections of q, k, v and of the output.
    pub projections: [&'a Projection<'a>; 4],
    /// Number of heads.
    pub num_heads: usize,
}

/// An image as rows of channels; a single entry, or several, serve equally many groups of tokens each.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Image<'a> {
    /// `[entries, n, C]`
    pub rows: &'a Tensor,
    /// Added to what is scored, `[1, n, C]`.
    pub positions: &'a Tensor,
    /// `q_proj(rows + positions) [entries, n, inner]`, where it is there already.
    pub q: Option<&'a Tensor>,
}

impl Merged {
    fn new(projection: &Projection<'_>) -> Result<Self> {
        let f32s = |tensor: &Tensor| tensor.to_dtype(DType::F32);
        let mut weight = f32s(projection.weight)?;
        let mut bias = projection.bias.map(f32s).transpose()?;
        if let Some(lora) = &projection.lora {
            weight = (weight + (f32s(lora.b)?.matmul(&f32s(lora.a)?)? * lora.scaling)?)?;
            if let Some(lora_bias) = lora.b_bias {
                let lora_bias = (f32s(lora_bias)? * lora.scaling)?;
                bias = Some(bias.map_or(Ok(lora_bias.clone()), |bias| bias + &lora_bias)?);
            }
        }
        Ok(Self { weight, bias })
    }

    /// Calls `f` with the weight `[inner, channels]` and the bias.
    fn with<R>(&self, f: impl FnOnce(&Absorbed<'_>) -> Result<R>) -> Result<R> {
        with_f32(OP, &self.weight, |weight| match &self.bias {
            None => f(&Absorbed { weight: &weight, bias: &[] }),
            Some(bias) => with_f32(OP, bias, |bias| f(&Absorbed { weight: &weight, bias: &bias })),
        })
    }
}

/// The shapes, where the absorbed order of products applies and pays, and whether a gradient is wanted.
fn shape(
    tokens: &Tensor,
    image: &Image<'_>,
    attention: &CrossAttention<'_>,
    others: &[&Tensor],
) -> Result<Option<(Shape, bool)>> {
    let (entries, rows, channels) = image.rows.dims3()?;
    let (groups, count, inner) = tokens.dims3()?;
    let heads = attention.num_heads;
    let projections = attention.projections;
    let dropped = |p: &&Projection<'_>| p.lora.is_some_and(|lora| lora.dropout.is_some());
    let parameters = projections.iter().flat_map(|p| p.parameters().chain([p.weight]));
    let inputs = [tokens, image.rows].into_iter().chain(image.q).chain(parameters);
    let (mut on_cpu, mut tracked) = (is_plain(image.positions), false);
    for tensor in inputs.chain(others.iter().copied()) {
        on_cpu &= tensor.device().is_cpu();
        tracked |= tensor.track_op();
    }
    let applies = on_cpu
        && !projections.iter().any(dropped)
        && channels.is_multiple_of(MAX_LANES)
        && inner.is_multiple_of(heads)
        && count * heads <= inner
        && entries > 0
        && groups.is_multiple_of(entries)
        && image.q.is_none_or(|q| q.dims() == [entries, rows, inner])
        // The backward has the projected rows' channels in vectors, and no column for the last token.
        && !(tracked && (count < 2 || !inner.is_multiple_of(MAX_LANES)));
    let softmax_scale = ((inner / heads) as f32).powf(-0.5);
    let bf16 = !tracked && projections[0].weight.dtype() == DType::BF16;
    let shape = Shape { rows, channels, tokens: count, heads, inner, softmax_scale, bf16 };
    Ok(applies.then_some((shape, tracked)))
}

/// Whether a tensor is on the CPU and wants no gradient.
fn is_plain(tensor: &Tensor) -> bool {
    matches!(tensor.device(), Device::Cpu) && !tensor.track_op()
}

fn tensor(values: Vec<f32>, dims: &[usize], dtype: DType) -> Result<Tensor> {
    let storage = Storage::Cpu(from_f32(OP, values, dtype)?);
    Ok(Tensor::from_storage(storage, dims, BackpropOp::none(), false))
}

/// Projected queries `[G, N, inner]` look at the image: `[G, N, inner]`, before the output projection.
pub(crate) fn tokens_to_image(
    q: &Tensor,
    image: &Image<'_>,
    attention: &CrossAttention<'_>,
) -> Result<Option<Tensor>> {
    let Some((shape, tracked)) = shape(q, image, attention, &[])? else { return Ok(None) };
    let [_, k, v, _] = attention.projections.map(Merged::new);
    let (k, v) = (k?, v?);
    if tracked {
        let rows = (image.rows, image.positions);
        return absorbed::tokens_to_image(shape, q, rows, &[k, v]).map(Some);
    }
    let out = with_f32(OP, q, |q| {
        with_f32(OP, image.rows, |x| {
            with_f32(OP, image.positions, |positions| {
                k.with(|k| v.with(|v| Ok(cpu::tokens_to_image(&shape, &q, (&x, &positions), k, v))))
            })
        })
    })?;
    tensor(out, q.dims(), q.dtype()).map(Some)
}

/// The image looks at projected k and v `[G, N, inner]`: `norm(image + out_proj(attention))`, `[G, n, C]` in f32:
/// rows that pass between these functions need no rounding.
pub(crate) fn image_to_tokens(
    image: &Image<'_>,
    [k, v]: [&Tensor; 2],
    attention: &CrossAttention<'_>,
    norm: &Norm<'_>,
) -> Result<Option<Tensor>> {
    let others = [v, norm.weight, norm.bias];
    let Some((shape, tracked)) = shape(k, image, attention, &others)? else { return Ok(None) };
    let [q, _, _, out] = attention.projections.map(Merged::new);
    let (mut q, mut out) = (q?, out?);
    if tracked {
        let rows = (image.rows, image.positions, image.q);
        return absorbed::image_to_tokens(shape, rows, [k, v], &[q, out], norm).map(Some);
    }
    out.weight = out.weight.t()?.contiguous()?;
    // Rows that are projected need no weight.
    let (scored, depth) = match image.q {
        Some(projected) => (projected, shape.inner),
        None => (image.rows, shape.channels),
    };
    if image.q.is_some() {
        q.bias = None;
    }
    let values = with_f32(OP, image.rows, |x| {
        with_f32(OP, scored, |scored| {
            with_f32(OP, image.positions, |shift| {
                let shift = if image.q.is_some() { &[][..] } else { &shift };
                let scored = Scored { x: &scored, shift, depth };
                with_f32(OP, k, |k| {
                    with_f32(OP, v, |v| {
                        with_output(&out, norm, |output| {
                            q.with(|q| {
                                let weight = if image.q.is_some() { &[][..] } else { q.weight };
                                let q = Absorbed { weight, ..*q };
                                let scored = (&scored, &q);
                                Ok(cpu::image_to_tokens(&shape, &x, scored, [&k, &v], output))
                            })
                        })
                    })
                })
            })
        })
    })?;
    let dims = [k.dims()[0], shape.rows, shape.channels];
    tensor(values.into_vec(), &dims, DType::F32).map(Some)
}

fn with_output<R>(
    out: &Merged,
    norm: &Norm<'_>,
    f: impl FnOnce(&Output<'_>) -> Result<R>,
) -> Result<R> {
    with_f32(OP, norm.weight, |weight| {
        with_f32(OP, norm.bias, |bias| {
            out.with(|out| {
                let norm = (&*weight, &*bias, norm.eps);
                f(&Output { weight: out.weight, bias: out.bias, norm })
            })
        })
    })
}

/// Two transposed 2x2 convolutions with a norm and a GELU between them and a GELU after, each as `[taps out, in]` and
/// `[taps out]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Upscaling<'a> {
    /// Weight and bias of the first.
    pub conv1: (&'a Tensor, &'a Tensor),
    /// Between the two.
    pub norm: Norm<'a>,
    /// Weight and bias of the second.
    pub conv2: (&'a Tensor, &'a Tensor),
}

/// Masks `[G, M, 16 h w]` of the image `[G, h w, C]` by the hypernetworks' `[G, M, E]`.
pub(crate) fn upscaled_masks(
    image: &Tensor,
    grid: (usize, usize),
    up: &Upscaling<'_>,
    hyper: &Tensor,
) -> Result<Option<Tensor>> {
    let (groups, count, eighth) = hyper.dims3()?;
    let parameters = [up.conv1.0, up.conv1.1, up.conv2.0, up.conv2.1, up.norm.weight, up.norm.bias];
    let tensors = || [image, hyper].into_iter().chain(parameters);
    if !tensors().all(|tensor| tensor.device().is_cpu()) {
        return Ok(None);
    }
    if tensors().any(Tensor::track_op) {
        if !UpscaleShape::applies(8 * eighth) {
            return Ok(None);
        }
        let [conv1, bias1, conv2, bias2, weight, bias] = parameters;
        let order = [conv1, bias1, weight, bias, conv2, bias2];
        let lengths = order.map(Tensor::elem_count);
        let shape = UpscaleShape { grid, lengths, eps: up.norm.eps, masks: count };
        let parameters = params::pack(order, image.device())?;
        return absorbed::upscaled_masks(shape, image, hyper, &parameters).map(Some);
    }
    let inputs = parameters.map(|tensor| tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1());
    let [conv1, bias1, conv2, bias2, weight, bias] = inputs;
    let (conv1, bias1, conv2, bias2) = (conv1?, bias1?, conv2?, bias2?);
    let (weight, bias): (Vec<f32>, Vec<f32>) = (weight?, bias?);
    if bias2.len() != 4 * eighth {
        candle_core::bail!("{OP}: {} outputs of the second convolution for {eighth}", bias2.len())
    }
    let values = with_f32(OP, image, |x| {
        with_f32(OP, hyper, |hyper| {
            let norm = (&*weight, &*bias, up.norm.eps);
            let (conv1, conv2) = ((&*conv1, &*bias1), (&*conv2, &*bias2));
            let bf16 = up.conv1.0.dtype() == DType::BF16;
            Ok(masks(&Upscale { grid, conv1, norm, conv2, bf16 }, &x, &hyper, count))
        })
    })?;
    let dims = [groups, count, 16 * grid.0 * grid.1];
    tensor(values.into_vec(), &dims, hyper.dtype()).map(Some)
}
