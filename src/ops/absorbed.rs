//! The image side of the mask decoder with gradients, on the CPU.
//!
//! Tokens absorb the projections in candle's graph, in products of few rows, which carry the gradients of tokens,
//! weights and adapters. The operations here know absorbed tokens alone, [`crate::cpu::image_side`] has the formulas.
//! Everything is in f32: the backward's sums cancel.

use super::computed::node;
use super::custom::{tensor_like, with_f32};
use super::{broadcast_add, params, Norm};
use crate::cpu::image_side::{self as cpu, Scored, Shape, TokenSide};
use crate::cpu::upscale::{masks, Upscale};
use crate::cpu::upscale_gradient;
use candle_core::{bail, CpuStorage, DType, Result, Storage, Tensor, D};

const OP: &str = "image-side";

/// A projection's weight `[out, in]` with its adapter, and its bias `[out]`, in f32.
pub(super) struct Merged {
    pub weight: Tensor,
    pub bias: Option<Tensor>,
}

/// `tokens [G, N, inner]` times a weight `[inner, C]`, each head with its own rows: `[G, N heads, C]`.
fn absorb(tokens: &Tensor, weight: &Tensor, heads: usize) -> Result<Tensor> {
    let (groups, count, inner) = tokens.dims3()?;
    let (d, channels) = (inner / heads, weight.dim(1)?);
    let by_head = tokens.reshape((groups * count, heads, d))?.transpose(0, 1)?.contiguous()?;
    let columns = by_head.matmul(&weight.reshape((heads, d, channels))?)?;
    columns.transpose(0, 1)?.reshape((groups, count * heads, channels))
}

/// Queries `[G, N, inner]` look at the image `x [G or fewer, n, C]`: `[G, N, inner]`.
pub(super) fn tokens_to_image(
    s: Shape,
    q: &Tensor,
    (x, positions): (&Tensor, &Tensor),
    [k, v]: &[Merged; 2],
) -> Result<Tensor> {
    let (groups, count, inner) = q.dims3()?;
    let (heads, d, c) = (s.heads, s.inner / s.heads, s.channels);
    let columns = absorb(&q.to_dtype(DType::F32)?, &k.weight, heads)?;
    let means = means(s, x, positions, &columns)?;
    let by_head = means.reshape((groups * count, heads, c))?.transpose(0, 1)?.contiguous()?;
    let weight = v.weight.reshape((heads, d, c))?.transpose(1, 2)?;
    let out = by_head.matmul(&weight)?.transpose(0, 1)?.reshape((groups, count, inner))?;
    let mut out = match &v.bias {
        Some(bias) => broadcast_add(&out, bias)?,
        None => out,
    };
    // k's bias has a gradient of zero. With none an optimizer would not decay it. candle drops a factor of zero from
    // the graph, but no tensor of zeros.
    if let Some(bias) = k.bias.as_ref().filter(|bias| bias.track_op()) {
        out = broadcast_add(&out, &(bias * bias.zeros_like()?)?.sum_all()?)?;
    }
    out.to_dtype(q.dtype())
}

/// The means of the rows under the weights of each column, `[G, columns, C]` as the columns.
fn means(s: Shape, x: &Tensor, positions: &Tensor, columns: &Tensor) -> Result<Tensor> {
    let columns = &columns.contiguous()?;
    let positions = positions.detach();
    let (values, normalizers) = with_f32(OP, x, |x| {
        with_f32(OP, &positions, |positions| {
            with_f32(OP, columns, |columns| Ok(cpu::means(&s, (&x, &positions), &columns)))
        })
    })?;
    let value = (Storage::Cpu(CpuStorage::F32(values)), columns.shape().clone());
    node(OP, (x, Some(columns), None), value, move |[x, columns, _], means, grad| {
        let (dx, dcolumns) = with_f32(OP, x, |x| {
            with_f32(OP, &positions, |positions| {
                with_f32(OP, columns, |columns| {
                    with_f32(OP, means, |means| {
                        with_f32(OP, grad, |grad| {
                            let (image, kept) = ((&*x, &*positions), (&*means, &*normalizers));
                            Ok(cpu::means_backward(&s, image, &columns, kept, &grad))
                        })
                    })
                })
            })
        })?;
        let dx = x.track_op().then(|| tensor_like(dx.into_vec(), x)).transpose()?;
        Ok((dx, Some(tensor_like(dcolumns, columns)?), None))
    })
}

/// The image `x [G or fewer, n, C]` looks at projected k and v `[G, N, inner]`: `norm(x + out_proj(attention))`,
/// `[G, n, C]` in f32. `projected` is `q_proj(x + positions)`, where it is there already.
pub(super) fn image_to_tokens(
    s: Shape,
    (x, positions, projected): (&Tensor, &Tensor, Option<&Tensor>),
    [k, v]: [&Tensor; 2],
    [q, out]: &[Merged; 2],
    norm: &Norm<'_>,
) -> Result<Tensor> {
    let (groups, count, inner) = k.dims3()?;
    let relative = |tokens: &Tensor| {
        let tokens = tokens.to_dtype(DType::F32)?;
        let last = tokens.narrow(1, count - 1, 1)?;
        Ok::<_, candle_core::Error>((tokens.narrow(1, 0, count - 1)?.broadcast_sub(&last)?, last))
    };
    let ((k, _), (v, last)) = (relative(k)?, relative(v)?);
    let s = Shape { tokens: count - 1, bf16: false, ..s };
    // Rows that are projected meet k as it is, each head its own columns.
    let keys = match projected {
        Some(_) => absorb(&k, &Tensor::eye(inner, DType::F32, k.device())?, s.heads)?,
        None => absorb(&k, &q.weight, s.heads)?,
    };
    let constants = match &q.bias {
        Some(bias) if projected.is_none() => {
            let by_head = broadcast_mul(&k, bias)?.reshape((groups, s.columns(), ()))?;
            (by_head.sum(D::Minus1)? * f64::from(s.softmax_scale))?
        }
        _ => Tensor::zeros((groups, s.columns()), DType::F32, k.device())?,
    };
    let weight = out.weight.t()?.contiguous()?;
    let values = absorb(&v, &weight, s.heads)?;
    let base = last.squeeze(1)?.matmul(&weight)?;
    let base = match &out.bias {
        Some(bias) => broadcast_add(&base, bias)?,
        None => base,
    };
    let side = [&keys, &constants, &values, &base, norm.weight, norm.bias];
    mixed(s, (x, positions, projected), &params::pack(side, k.device())?, norm.eps)
}

/// `x * factors`, with candle's gradients: for few rows.
fn broadcast_mul(x: &Tensor, factors: &Tensor) -> Result<Tensor> {
    super::scale_shift(x, Some(factors), None)
}

/// The rows plus what they see of the tokens, and the norm; `side` is that of a [`TokenSide`].
fn mixed(
    s: Shape,
    (x, positions, projected): (&Tensor, &Tensor, Option<&Tensor>),
    side: &Tensor,
    eps: f64,
) -> Result<Tensor> {
    let positions = positions.detach();
    let is_projected = projected.is_some();
    let depth = if is_projected { s.inner } else { s.channels };
    let value = with_rows((x, &positions, projected), depth, |x, scored| {
        with_f32(OP, side, |side| {
            Ok(cpu::mixed(&s, x, scored, &token_side(&s, depth, &side, eps)?))
        })
    })?;
    let groups = value.len() / (s.rows * s.channels);
    let value =
        (Storage::Cpu(CpuStorage::F32(value.into_vec())), (groups, s.rows, s.channels).into());
    node(OP, (x, Some(side), projected), value, move |[x, side, projected], _, grad| {
        let rows = (x, &positions, is_projected.then_some(projected));
        let grads = with_rows(rows, depth, |x, scored| {
            with_f32(OP, side, |side| {
                let side = token_side(&s, depth, &side, eps)?;
                with_f32(OP, grad, |grad| Ok(cpu::mixed_backward(&s, x, scored, &side, &grad)))
            })
        })?;
        let wanted = |values: Vec<f32>, like: &Tensor| {
            like.track_op().then(|| tensor_like(values, like)).transpose()
        };
        let dprojected = match is_projected {
            true => wanted(grads.scored.into_vec(), projected)?,
            false => None,
        };
        Ok((wanted(grads.x.into_vec(), x)?, wanted(grads.side, side)?, dprojected))
    })
}

fn token_side<'a>(s: &Shape, depth: usize, flat: &'a [f32], eps: f64) -> Result<TokenSide<'a>> {
    match TokenSide::new(s, depth, flat, eps) {
        Some(side) => Ok(side),
        None => bail!("{OP}: {} numbers are no side of tokens", flat.len()),
    }
}

/// Calls `f` with the rows, and with what is scored of them.
fn with_rows<R>(
    (x, positions, projected): (&Tensor, &Tensor, Option<&Tensor>),
    depth: usize,
    f: impl FnOnce(&[f32], &Scored<'_>) -> Result<R>,
) -> Result<R> {
    with_f32(OP, x, |x| match projected {
        Some(projected) => with_f32(OP, projected, |z| f(&x, &Scored { x: &z, shift: &[], depth })),
        None => with_f32(OP, positions, |shift| f(&x, &Scored { x: &x, shift: &shift, depth })),
    })
}

/// Shapes of the upscaling.
#[derive(Clone, Copy)]
pub(super) struct UpscaleShape {
    /// Rows and columns of the image.
    pub grid: (usize, usize),
    /// Lengths of the first convolution's weight and bias, the norm's, and the second convolution's.
    pub lengths: [usize; 6],
    /// The norm's epsilon.
    pub eps: f64,
    /// Masks of a group.
    pub masks: usize,
}

impl UpscaleShape {
    /// Whether [`upscaled_masks`] is for an image of so many channels.
    pub fn applies(channels: usize) -> bool {
        upscale_gradient::applies(channels)
    }

    /// The parameters, packed in the order of the lengths.
    fn upscale<'a>(&self, flat: &'a [f32]) -> Upscale<'a> {
        let mut rest = flat;
        let [conv1, bias1, weight, bias, conv2, bias2] = self.lengths.map(|length| {
            let (part, behind) = rest.split_at(length);
            rest = behind;
            part
        });
        Upscale {
            grid: self.grid,
            conv1: (conv1, bias1),
            norm: (weight, bias, self.eps),
            conv2: (conv2, bias2),
            bf16: false,
        }
    }
}

/// Masks `[G, M, 16 h w]` of the image `x [G, h w, C]` by `hyper [G, M, E]`; `parameters` are packed.
pub(super) fn upscaled_masks(
    shape: UpscaleShape,
    x: &Tensor,
    hyper: &Tensor,
    parameters: &Tensor,
) -> Result<Tensor> {
    let value = with_f32(OP, x, |x| {
        with_f32(OP, hyper, |hyper| {
            with_f32(OP, parameters, |flat| {
                Ok(masks(&shape.upscale(&flat), &x, &hyper, shape.masks))
            })
        })
    })?;
    let (groups, pixels) = (hyper.dim(0)?, 16 * shape.grid.0 * shape.grid.1);
    let value = super::custom::from_f32(OP, value.into_vec(), hyper.dtype())?;
    let value = (Storage::Cpu(value), (groups, shape.masks, pixels).into());
    node(OP, (x, Some(hyper), Some(parameters)), value, move |[x, hyper, parameters], _, grad| {
        let grads = with_f32(OP, x, |x| {
            with_f32(OP, hyper, |hyper| {
                with_f32(OP, parameters, |flat| {
                    with_f32(OP, grad, |grad| {
                        let (up, inputs) = (shape.upscale(&flat), (&*x, &*hyper));
                        let want_weights = parameters.track_op();
                        Ok(upscale_gradient::backward(
                            &up,
                            inputs,
                            shape.masks,
                            &grad,
                            want_weights,
                        ))
                    })
                })
            })
        })?;
        let wanted = |values: Vec<f32>, like: &Tensor| {
            like.track_op().then(|| tensor_like(values, like)).transpose()
        };
        let (dx, dhyper) = (wanted(grads.x.into_vec(), x)?, wanted(grads.hyper, hyper)?);
        Ok((dx, dhyper, wanted(grads.parameters, parameters)?))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::{composed, lora_linear, Activation, Projection};
    use candle_core::{Device, Var};

    /// Image rows, tokens and groups; entries of the image serve several groups.
    const SIZES: [(usize, usize, usize, usize); 3] = [(700, 3, 4, 2), (97, 2, 3, 1), (30, 4, 2, 2)];
    const HEADS: usize = 8;
    const C: usize = 128;
    const INNER: usize = 64;
    const EPS: f64 = 1e-6;

    /// Variables with values between -1 and 1, of these shapes.
    fn variables(shapes: &[&[usize]]) -> Result<Vec<Tensor>> {
        let variable = |(seed, shape): (usize, &&[usize])| {
            let count: usize = shape.iter().product();
            let value = |i: usize| ((i * 37 + seed * 1013) as f32 * 0.7123).sin();
            let values: Vec<f32> = (0..count).map(value).collect();
            Ok(Var::from_tensor(&Tensor::from_vec(values, *shape, &Device::Cpu)?)?.into_inner())
        };
        shapes.iter().enumerate().map(variable).collect()
    }

    /// Output and every gradient agree to 1e-4 of the largest: sums of at most 2800 products in f32.
    fn assert_agree(got: &Tensor, expected: &Tensor, inputs: &[Tensor]) -> Result<()> {
        let largest = |x: &Tensor| x.abs()?.max_all()?.to_scalar::<f32>();
        let check = |what: &str, got: &Tensor, expected: &Tensor| {
            let (error, size) = (largest(&(got - expected)?)?, largest(expected)?);
            assert!(error < 1e-4 * size, "{what}: {error:e} of {size:e}");
            Ok::<_, candle_core::Error>(())
        };
        check("output", got, expected)?;
        let factors = &variables(&[got.dims()])?[0].detach();
        let grads = [(got * factors)?.backward()?, (expected * factors)?.backward()?];
        for (index, input) in inputs.iter().enumerate() {
            match (grads[0].get(input), grads[1].get(input)) {
                (Some(got), Some(expected)) => check(&format!("input {index}"), got, expected)?,
                _ => bail!("input {index} has no gradient"),
            }
        }
        Ok(())
    }

    fn shape(rows: usize, tokens: usize) -> Shape {
        let softmax_scale = ((INNER / HEADS) as f32).powf(-0.5);
        Shape { rows, channels: C, tokens, heads: HEADS, inner: INNER, softmax_scale, bf16: false }
    }

    fn linear(x: &Tensor, weight: &Tensor, bias: &Tensor) -> Result<Tensor> {
        let projection = Projection { weight, scales: None, bias: Some(bias), lora: None };
        lora_linear(x, &projection, Activation::Identity, None)
    }

    /// An entry of the image for each group.
    fn for_each(x: &Tensor, groups: usize) -> Result<Tensor> {
        let (entries, n, c) = x.dims3()?;
        let all = x.unsqueeze(1)?.broadcast_as((entries, groups / entries, n, c))?;
        all.contiguous()?.flatten(0, 1)
    }

    #[test]
    fn tokens_that_look_agree_with_projected_rows() -> Result<()> {
        for (rows, tokens, groups, entries) in SIZES {
            let shapes: [&[usize]; 6] = [
                &[groups, tokens, INNER],
                &[entries, rows, C],
                &[INNER, C],
                &[INNER, C],
                &[INNER],
                &[1, rows, C],
            ];
            let mut inputs = variables(&shapes)?;
            let positions = inputs.pop().map(|positions| positions.detach());
            let (Some(positions), [q, x, k, v, bias]) = (positions, &inputs[..]) else {
                bail!("six inputs")
            };
            let merged = [
                Merged { weight: k.clone(), bias: None },
                Merged { weight: v.clone(), bias: Some(bias.clone()) },
            ];
            let s = shape(rows, tokens);
            let got = tokens_to_image(s, q, (x, &positions), &merged)?;
            let x = for_each(x, groups)?;
            let keys = linear(&x.broadcast_add(&positions)?, k, &bias.zeros_like()?)?;
            let qkv = [q, &keys, &linear(&x, v, bias)?];
            let expected = composed::multi_head_attention(qkv, HEADS, s.softmax_scale.into())?;
            assert_agree(&got, &expected, &inputs)?;
        }
        Ok(())
    }

    #[test]
    fn rows_that_look_agree_with_projected_ones() -> Result<()> {
        for ((rows, tokens, groups, entries), is_projected) in
            SIZES.into_iter().flat_map(|sizes| [(sizes, false), (sizes, true)])
        {
            let shapes: [&[usize]; 10] = [
                &[groups, tokens, INNER],
                &[groups, tokens, INNER],
                &[entries, rows, C],
                &[INNER, C],
                &[INNER],
                &[C, INNER],
                &[C],
                &[C],
                &[C],
                &[1, rows, C],
            ];
            let mut inputs = variables(&shapes)?;
            let positions = inputs.pop().map(|positions| positions.detach());
            let (Some(positions), [k, v, x, q, q_bias, out, out_bias, weight, bias]) =
                (positions, &inputs[..])
            else {
                bail!("ten inputs")
            };
            let merged = [(q, q_bias), (out, out_bias)];
            let merged = merged.map(|(w, b)| Merged { weight: w.clone(), bias: Some(b.clone()) });
            let s = shape(rows, tokens);
            let norm = Norm { weight, bias, eps: EPS };
            let projected = linear(&x.broadcast_add(&positions)?, q, q_bias)?;
            let image = (x, &positions, is_projected.then_some(&projected));
            let got = image_to_tokens(s, image, [k, v], &merged, &norm)?;
            let queries = for_each(&projected, groups)?;
            let attended =
                composed::multi_head_attention([&queries, k, v], HEADS, s.softmax_scale.into())?;
            let sum = (for_each(x, groups)? + linear(&attended, out, out_bias)?)?;
            let expected = composed::layer_norm(&sum, weight, bias, EPS)?;
            assert_agree(&got, &expected, &inputs)?;
        }
        Ok(())
    }

    #[test]
    fn upscaling_agrees_with_its_layers() -> Result<()> {
        let (groups, masks, grid, quarter, eighth) = (2, 3, (19, 5), C / 4, C / 8);
        let shapes: [&[usize]; 8] = [
            &[groups, grid.0 * grid.1, C],
            &[groups, masks, eighth],
            &[4 * quarter, C],
            &[4 * quarter],
            &[quarter],
            &[quarter],
            &[4 * eighth, quarter],
            &[4 * eighth],
        ];
        let inputs = variables(&shapes)?;
        let [x, hyper, conv1, bias1, weight, bias, conv2, bias2] = &inputs[..] else {
            bail!("eight inputs")
        };
        let parameters = [conv1, bias1, weight, bias, conv2, bias2];
        let lengths = parameters.map(Tensor::elem_count);
        let shape = UpscaleShape { grid, lengths, eps: EPS, masks };
        assert!(UpscaleShape::applies(C));
        let got = upscaled_masks(shape, x, hyper, &params::pack(parameters, x.device())?)?;
        let taps = |x: Tensor| x.reshape((groups, (), x.dim(D::Minus1)? / 4));
        let up = taps(linear(x, conv1, bias1)?)?;
        let up = Activation::Gelu.apply(&composed::layer_norm(&up, weight, bias, EPS)?)?;
        let up = taps(Activation::Gelu.apply(&linear(&up, conv2, bias2)?)?)?;
        let expected = hyper
            .matmul(&up.transpose(1, 2)?)?
            .reshape(vec![groups * masks, grid.0, grid.1, 2, 2, 2, 2])?
            .permute(vec![0, 1, 3, 5, 2, 4, 6])?
            .reshape((groups, masks, 16 * grid.0 * grid.1))?;
        assert_agree(&got, &expected, &inputs)
    }
}
