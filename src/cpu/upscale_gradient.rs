//! The gradients of the upscaling and of the masks, in the same blocks as the forward, which is computed again.
//!
//! ```text
//! dw = (sum_i dmask_i hyper_i) gelu'(u W2 + b2)      du = (dw W2) gelu'(norm)      dx = dnorm(du) W1
//! dhyper_i = sum over pixels of dmask_i w            dW2 = dw^T u                  dW1 = dnorm(du)^T x
//! ```

use super::activation::gelu_with_derivatives;
use super::buffer::Buffer;
use super::layer_norm;
use super::math::add;
use super::panel::{panel, Into, Left, Right};
use super::simd::{run, vectors, vectors_mut, MAX_LANES};
use super::upscale::{place, Layer, Upscale, TAPS};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Rows of positions of a task.
const ROWS: usize = 16;

/// Gradients of what [`masks`](super::upscale::masks) takes.
pub struct Gradients {
    /// Shaped as x.
    pub x: Buffer,
    /// Shaped as hyper.
    pub hyper: Vec<f32>,
    /// Weight and bias of the first convolution, the norm and the second convolution, one after the other. Those of the
    /// convolutions are zero unless they were asked for.
    pub parameters: Vec<f32>,
}

/// Whether [`backward`] is for an image of so many channels: whole vectors everywhere.
pub fn applies(channels: usize) -> bool {
    channels.is_multiple_of(8 * MAX_LANES)
}

/// The gradients for the gradient `grad [groups, masks, 4 h, 4 w]` of the masks, where [`applies`].
pub fn backward(
    up: &Upscale<'_>,
    (x, hyper): (&[f32], &[f32]),
    masks: usize,
    grad: &[f32],
    want_weights: bool,
) -> Gradients {
    let (h, w) = up.grid;
    let layers = [Layer::new(up.conv1, up.bf16), Layer::new(up.conv2, up.bf16)];
    let (c, eighth) = (layers[0].in_dim, up.conv2.1.len() / TAPS);
    let (row, row_pixels) = (w * c, TAPS * TAPS * w);
    let mut dx = Buffer::any(x.len());
    // Every group in as many tasks.
    let parts = h.div_ceil(ROWS);
    let mut tasks: Vec<&mut [f32]> = Vec::new();
    dx.chunks_exact_mut(h * row).for_each(|dx| tasks.extend(dx.chunks_mut(ROWS * row)));
    let sums: Vec<_> = tasks
        .into_par_iter()
        .enumerate()
        .map(|(index, dx)| {
            let (group, first) = (index / parts, index % parts * ROWS);
            let x = &x[(group * h + first) * row..][..dx.len()];
            let hyper = &hyper[group * masks * eighth..][..masks * eighth];
            let mut sums = Sums {
                hyper: vec![0f32; hyper.len()],
                parameters: vec![0f32; lengths(up).iter().sum()],
            };
            let mut scratch = Scratch::default();
            for (y, (dx, x)) in dx.chunks_exact_mut(row).zip(x.chunks_exact(row)).enumerate() {
                let rows = (0..masks).map(|mask| {
                    &grad[((group * masks + mask) * h + first + y) * row_pixels..][..row_pixels]
                });
                let masks: Vec<_> = rows.zip(hyper.chunks_exact(eighth)).collect();
                backward_row(up, &layers, (x, &masks), dx, (&mut sums, want_weights), &mut scratch);
            }
            sums
        })
        .collect();
    let mut gradients = Gradients {
        x: dx,
        hyper: vec![0f32; hyper.len()],
        parameters: vec![0f32; lengths(up).iter().sum()],
    };
    for (index, sums) in sums.iter().enumerate() {
        add(&mut gradients.hyper[index / parts * masks * eighth..], &sums.hyper);
        add(&mut gradients.parameters, &sums.parameters);
    }
    gradients
}

/// Elements of the parameters in their order.
fn lengths(up: &Upscale<'_>) -> [usize; 6] {
    let (weight, bias, _) = up.norm;
    [up.conv1.0, up.conv1.1, weight, bias, up.conv2.0, up.conv2.1].map(<[f32]>::len)
}

/// Sums over the rows of a task.
struct Sums {
    hyper: Vec<f32>,
    parameters: Vec<f32>,
}

/// Buffers of a task, used again for the next row.
#[derive(Default)]
struct Scratch {
    of_layers: [Vec<f32>; 2],
    /// The gradient of u.
    back: Vec<f32>,
    /// x W1 + b1, then normalised.
    sum: Vec<f32>,
    /// Its norm with weight and bias, then u.
    u: Vec<f32>,
    /// The derivative of u, then du and dnorm(du).
    du: Vec<f32>,
    fine: Vec<f32>,
    dfine: Vec<f32>,
}

/// The gradient of a mask's pixels `[4, 4 w]` at a row of positions, and the factors of its features `[E]`.
type MaskRows<'a> = (&'a [f32], &'a [f32]);

/// One row of positions.
fn backward_row(
    up: &Upscale<'_>,
    [conv1, conv2]: &[Layer<'_>; 2],
    (x, masks): (&[f32], &[MaskRows<'_>]),
    dx: &mut [f32],
    (sums, want_weights): (&mut Sums, bool),
    scratch: &mut Scratch,
) {
    let Scratch { of_layers, back, sum, u, du, fine, dfine } = scratch;
    let (c, quarter) = (conv1.in_dim, conv2.in_dim);
    let (width1, width2) = (up.conv1.1.len(), up.conv2.1.len());
    let count = x.len() / c;
    conv1.apply(x, sum, of_layers);
    u.clone_from(sum);
    let (weight, bias, eps) = up.norm;
    layer_norm::in_place(u, weight, bias, eps);
    du.resize(u.len(), 0.0);
    gelu_with_derivatives(u, du);
    conv2.apply(u, fine, of_layers);
    dfine.resize(fine.len(), 0.0);
    gelu_with_derivatives(fine, dfine);
    let eighth = width2 / TAPS;
    run(Pixels { masks, fine, dfine, eighth, sums: &mut sums.hyper });

    // du is the derivative of GELU until the product with the gradient.
    back.resize(u.len(), 0.0);
    let shape = (count * TAPS, quarter, width2);
    let (left, right) = (Left::Rows(dfine, width2), Right(up.conv2.0, quarter));
    panel((back, quarter), (Into::Store, 1.0), shape, left, right);
    run(Times { values: du, factors: back });

    let mut rest = &mut sums.parameters[..];
    let mut parts = lengths(up).map(|length| {
        let (part, behind) = std::mem::take(&mut rest).split_at_mut(length);
        rest = behind;
        part
    });
    let [dweight1, dbias1, dnorm_weight, dnorm_bias, dweight2, dbias2] = &mut parts;
    layer_norm::gradient_in_place(sum, du, (weight, eps), (dnorm_weight, dnorm_bias));
    let (left, right) = (Left::Rows(du, width1), Right(up.conv1.0, c));
    panel((dx, c), (Into::Store, 1.0), (count, c, width1), left, right);
    if want_weights {
        du.chunks_exact(width1).for_each(|row| add(dbias1, row));
        dfine.chunks_exact(width2).for_each(|row| add(dbias2, row));
        let (left, shape) = (Left::Columns(du, width1), (width1, c, count));
        panel((dweight1, c), (Into::Add, 1.0), shape, left, Right(x, c));
        let (left, shape) = (Left::Columns(dfine, width2), (width2, quarter, count * TAPS));
        panel((dweight2, quarter), (Into::Add, 1.0), shape, left, Right(u, quarter));
    }
}

/// `dfine *=` the sum over the masks of `dmask hyper`, and `sums += dmask fine`.
struct Pixels<'a> {
    masks: &'a [MaskRows<'a>],
    /// `[w, taps of the first convolution, taps of the second, E]`
    fine: &'a [f32],
    /// As `fine`.
    dfine: &'a mut [f32],
    eighth: usize,
    /// `[masks, E]`
    sums: &'a mut [f32],
}

impl WithSimd for Pixels<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Self { masks, fine, dfine, eighth, sums } = self;
        let vectors_of = eighth / S::F32_LANES;
        let fine = vectors::<S>(fine).chunks_exact(vectors_of);
        let pixels = fine.zip(vectors_mut::<S>(dfine).chunks_exact_mut(vectors_of));
        let sums = vectors_mut::<S>(sums);
        for (index, (fine, dfine)) in pixels.enumerate() {
            let (position, pixel) = (index / (TAPS * TAPS), index % (TAPS * TAPS));
            for (i, (fine, dfine)) in fine.iter().zip(dfine).enumerate() {
                let mut factor = simd.splat_f32s(0.0);
                for (mask, (rows, hyper)) in masks.iter().enumerate() {
                    let grad = simd.splat_f32s(rows[place(rows.len() / TAPS, position, pixel)]);
                    factor = simd.mul_add_f32s(grad, vectors::<S>(hyper)[i], factor);
                    let sum = &mut sums[mask * vectors_of + i];
                    *sum = simd.mul_add_f32s(grad, *fine, *sum);
                }
                *dfine = simd.mul_f32s(*dfine, factor);
            }
        }
    }
}

/// `values *= factors`
struct Times<'a> {
    values: &'a mut [f32],
    factors: &'a [f32],
}

impl WithSimd for Times<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        for (value, &factor) in
            vectors_mut::<S>(self.values).iter_mut().zip(vectors::<S>(self.factors))
        {
            *value = simd.mul_f32s(*value, factor);
        }
    }
}
