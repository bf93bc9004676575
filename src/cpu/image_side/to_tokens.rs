//! The image looks at the tokens: every row plus the tokens' values under its weights, and a norm.
//!
//! ```text
//! y_m = norm(r_m)      r_m = x_m + base + sum_c P[m, c] V_c      S[m, c] = scale z_m . K_c + constant_c
//! dP[m, c] = dr_m . V_c          dS: see `over_tokens`           dV_c = sum_m P[m, c] dr_m
//! dK_c = scale sum_m dS[m, c] z_m      dz_m = scale sum_c dS[m, c] K_c      dx_m = dr_m (+ dz_m, where z is x + p)
//! ```
//! Weights of a head add up to one, and a softmax knows differences alone. So K and V are relative to those of the last
//! token, which has no columns.

use super::over_tokens::{OverTokens, OverTokensGradient};
use super::{absorb, entry, score, stretches, transposed, turned};
use super::{Absorbed, Scored, Shape, Stretch, Sum, Tokens, BLOCK};
use crate::cpu::bf16;
use crate::cpu::blocked::{add_term, Packed, Term};
use crate::cpu::buffer::Buffer;
use crate::cpu::layer_norm;
use crate::cpu::math::{add, add_scaled, dot};
use crate::cpu::panel::{panel, Into, Left, Right};
use crate::cpu::simd::{padded, run};
use rayon::prelude::*;
use std::f32::consts::LOG2_E;

/// The end of [`image_to_tokens`].
#[derive(Clone, Copy)]
pub struct Output<'a> {
    /// The output projection's weight, transposed: `[inner, channels]`.
    pub weight: &'a [f32],
    /// Its bias, `[channels]`, or empty.
    pub bias: &'a [f32],
    /// The norm's weight and bias, and epsilon.
    pub norm: (&'a [f32], &'a [f32], f64),
}

/// The image `x [groups or 1, rows, channels]` looks at k and v, `[groups, tokens, inner]` each:
/// `norm(x + out_proj(attention))`, `[groups, rows, channels]`.
pub fn image_to_tokens(
    s: &Shape,
    x: &[f32],
    (scored, q): (&Scored<'_>, &Absorbed<'_>),
    [k, v]: [&[f32]; 2],
    output: &Output<'_>,
) -> Buffer {
    let (c, d, size, depth) = (s.channels, s.inner / s.heads, s.tokens * s.inner, scored.depth);
    let relative = Shape { tokens: s.tokens - 1, ..*s };
    let met = |group: usize| {
        let (k, v) = (&k[group * size..][..size], &v[group * size..][..size]);
        let ((k, _), (v, last)) = (from_last(k, s.inner), from_last(v, s.inner));
        let keys = Tokens::new(&relative, &absorb(&relative, &k, q.weight, depth), depth);
        let values = Values::new(&relative, absorb(&relative, &v, output.weight, c));
        let mut base = vec![0f32; c];
        for (&factor, row) in last.iter().zip(output.weight.chunks_exact(c)) {
            add_scaled(&mut base, factor, row);
        }
        add(&mut base, output.bias);
        // q's bias adds a constant to each column's scores.
        let mut constants = vec![0f32; relative.pitch()];
        if !q.bias.is_empty() {
            for (column, k) in k.chunks_exact(d).enumerate() {
                let bias = &q.bias[column % s.heads * d..][..d];
                constants[column] = dot(k, bias) * s.softmax_scale * LOG2_E;
            }
        }
        Met { keys, values, constants, base }
    };
    mixed_with(&relative, (x, scored), k.len() / size, met, output.norm)
}

/// The tokens of a group as the rows meet them.
struct Met {
    keys: Tokens,
    values: Values,
    /// Added to the scores, to base two; `[pitch]`.
    constants: Vec<f32>,
    /// Added to each row.
    base: Vec<f32>,
}

/// Rows that looked at the tokens of each of `groups` groups.
fn mixed_with(
    s: &Shape,
    (x, scored): (&[f32], &Scored<'_>),
    groups: usize,
    met: impl Fn(usize) -> Met + Sync,
    (weight, bias, eps): (&[f32], &[f32], f64),
) -> Buffer {
    let (c, used, pitch, heads, depth) =
        (s.channels, s.columns(), s.pitch(), s.heads, scored.depth);
    let mut out = Buffer::any(groups * s.rows * c);
    out.par_chunks_mut(s.rows * c).enumerate().for_each(|(group, out)| {
        let Met { keys, values, constants, base } = &met(group);
        let x = entry(x, s.rows * c, (group, groups));
        let scored_x = entry(scored.x, s.rows * depth, (group, groups));
        let blocks = out.par_chunks_mut(BLOCK * c).enumerate();
        blocks.for_each_init(Scratch::default, |scratch, (block, out)| {
            let Scratch { weights, last, pairs, acc } = scratch;
            let (first, count) = (block * BLOCK, out.len() / c);
            weights.resize(count * pitch, 0.0);
            last.resize(padded(count * heads), 0.0);
            score(s, (scored_x, scored.shift, depth), first, keys, weights);
            run(OverTokens { scores: weights, last, constants, used, heads });
            run(Sum { out, a: &x[first * c..][..count * c], b: base });
            match values {
                Values::F32(values) => {
                    let (left, right) = (Left::Rows(weights, pitch), Right(values, c));
                    panel((out, c), (Into::Add, 1.0), (count, c, used), left, right);
                }
                Values::Pairs(right) => {
                    let (left, stride) = (bf16::pairs_in(weights, pairs), pitch / 2);
                    add_term(out, count, &Term { left, stride, right, scale: 1.0 }, acc);
                }
            }
            layer_norm::in_place(out, weight, bias, eps);
        });
    });
    out
}

/// Buffers of a task, used again for the next.
#[derive(Default)]
struct Scratch {
    weights: Vec<f32>,
    last: Vec<f32>,
    pairs: Vec<f32>,
    acc: Vec<f32>,
}

/// The tokens' side of the output, packed for one kind of product.
enum Values {
    /// `[columns, channels]`
    F32(Vec<f32>),
    /// Pairs of columns, see [`crate::cpu::bf16`].
    Pairs(Packed),
}

impl Values {
    /// From [`absorb`]ed columns `[pitch, channels]`.
    fn new(s: &Shape, columns: Vec<f32>) -> Self {
        let used = s.columns();
        if !(s.bf16 && bf16::available() && used.is_multiple_of(2)) {
            return Self::F32(columns);
        }
        let rows = transposed(&columns[..used * s.channels], s.channels);
        Self::Pairs(Packed::from_transposed_pairs(&bf16::pairs(&rows), s.channels, used))
    }
}

/// All rows but the last relative to the last, and the last.
fn from_last(rows: &[f32], width: usize) -> (Vec<f32>, &[f32]) {
    let (others, last) = rows.split_at(rows.len().saturating_sub(width));
    let differences = others.chunks_exact(width).flat_map(|row| row.iter().zip(last));
    (differences.map(|(x, last)| x - last).collect(), last)
}

/// The tokens absorbed, and the norm, as one flat array: K, the constants, V, the bases, the norm's weight and bias.
#[derive(Clone, Copy)]
pub struct TokenSide<'a> {
    /// K `[groups, columns, depth]`, constants `[groups, columns]`, V `[groups, columns, channels]`, bases
    /// `[groups, channels]`
    parts: [&'a [f32]; 4],
    /// Elements of a group in each of them.
    sizes: [usize; 4],
    norm: (&'a [f32], &'a [f32], f64),
}

impl<'a> TokenSide<'a> {
    /// None if the length is wrong.
    pub fn new(s: &Shape, depth: usize, flat: &'a [f32], eps: f64) -> Option<Self> {
        let (c, used) = (s.channels, s.columns());
        let sizes = [used * depth, used, used * c, c];
        let groups = flat.len().checked_sub(2 * c)? / sizes.iter().sum::<usize>();
        let mut rest = flat;
        let parts = sizes.map(|size| {
            let (part, behind) = rest.split_at(groups * size);
            rest = behind;
            part
        });
        let (weight, bias) = rest.split_at_checked(c)?;
        (bias.len() == c).then_some(Self { parts, sizes, norm: (weight, bias, eps) })
    }

    fn groups(&self) -> usize {
        self.parts[1].len() / self.sizes[1]
    }

    fn group(&self, group: usize) -> [&'a [f32]; 4] {
        let mut parts = self.parts;
        for (part, size) in parts.iter_mut().zip(self.sizes) {
            *part = &part[group * size..][..size];
        }
        parts
    }
}

/// As [`image_to_tokens`] for tokens that are absorbed already and relative to the last, which `s` does not count.
pub fn mixed(s: &Shape, x: &[f32], scored: &Scored<'_>, side: &TokenSide<'_>) -> Buffer {
    let met = |group: usize| {
        let [keys, constants, values, base] = side.group(group);
        Met {
            keys: Tokens::F32(turned(s, keys, scored.depth)),
            values: Values::F32(values.to_vec()),
            constants: to_base_two(s, constants),
            base: base.to_vec(),
        }
    };
    mixed_with(s, (x, scored), side.groups(), met, side.norm)
}

fn to_base_two(s: &Shape, constants: &[f32]) -> Vec<f32> {
    let mut to_base_two: Vec<f32> = constants.iter().map(|x| x * LOG2_E).collect();
    to_base_two.resize(s.pitch(), 0.0);
    to_base_two
}

/// A group in the backward.
struct Group<'a> {
    /// K `[columns, depth]`, and turned `[depth, pitch]`.
    keys: (&'a [f32], Vec<f32>),
    /// V `[columns, channels]`, and turned.
    values: (&'a [f32], Vec<f32>),
    constants: Vec<f32>,
    base: &'a [f32],
    /// The gradient of its rows, `[rows, channels]`.
    grad: &'a [f32],
}

/// Buffers of a block.
struct Block {
    weights: Vec<f32>,
    grads: Vec<f32>,
    last: Vec<f32>,
    /// r, then its norm.
    sums: Vec<f32>,
    /// dy, then dr.
    dsums: Vec<f32>,
}

impl Group<'_> {
    /// Adds to the gradients of the rows x from `first` on, of z, of the tokens and of the norm. Without a place for
    /// dz, z is x and a shift.
    fn add_gradients(
        &self,
        (s, norm): (&Shape, (&[f32], f64)),
        (first, x, z): (usize, &[f32], &[f32]),
        block: &mut Block,
        (dx, dz): (&mut [f32], Option<&mut [f32]>),
        [dkeys, dconstants, dvalues, dbase, dnorm]: [&mut [f32]; 5],
    ) {
        let (c, used, pitch, heads) = (s.channels, s.columns(), s.pitch(), s.heads);
        let (count, scale) = (x.len() / c, s.softmax_scale);
        let depth = z.len() / count;
        let (weights, grads) =
            (&mut block.weights[..count * pitch], &mut block.grads[..count * pitch]);
        let (sums, dsums) = (&mut block.sums[..count * c], &mut block.dsums[..count * c]);
        let last = &mut block.last[..padded(count * heads)];
        let (left, right) = (Left::Rows(z, depth), Right(&self.keys.1, pitch));
        let shape = (count, pitch, depth);
        panel((weights, pitch), (Into::Store, scale * LOG2_E), shape, left, right);
        run(OverTokens { scores: weights, last, constants: &self.constants, used, heads });
        run(Sum { out: sums, a: x, b: self.base });
        let (p, rows) = (Left::Rows(weights, pitch), (count, c, used));
        panel((sums, c), (Into::Add, 1.0), rows, p, Right(self.values.0, c));
        dsums.copy_from_slice(&self.grad[first * c..][..count * c]);
        layer_norm::gradient_in_place(sums, dsums, norm, dnorm.split_at_mut(c));
        dsums.chunks_exact(c).for_each(|row| add(dbase, row));
        let (left, right) = (Left::Rows(dsums, c), Right(&self.values.1, pitch));
        panel((grads, pitch), (Into::Store, 1.0), (count, pitch, c), left, right);
        run(OverTokensGradient { weights, grads, pitch, sums: dconstants, heads });
        let (p, ds) = (Left::Columns(weights, pitch), Left::Columns(grads, pitch));
        panel((dvalues, c), (Into::Add, 1.0), (used, c, count), p, Right(dsums, c));
        panel((dkeys, depth), (Into::Add, scale), (used, depth, count), ds, Right(z, depth));
        add(dx, dsums);
        let ds = Left::Rows(grads, pitch);
        let dz = dz.unwrap_or(dx);
        panel((dz, depth), (Into::Add, scale), (count, depth, used), ds, Right(self.keys.0, depth));
    }
}

/// Gradients of what [`mixed`] takes.
pub struct Gradients {
    /// Shaped as x.
    pub x: Buffer,
    /// Shaped as the scored rows; empty where those are `x + shift`.
    pub scored: Buffer,
    /// Gradient of the [`TokenSide`]'s flat array.
    pub side: Vec<f32>,
}

/// The gradients for the gradient `grad` of what [`mixed`] gave. Rows that are scored without a shift are a tensor of
/// their own; else they are x.
pub fn mixed_backward(
    s: &Shape,
    x: &[f32],
    scored: &Scored<'_>,
    side: &TokenSide<'_>,
    grad: &[f32],
) -> Gradients {
    let (c, depth, pitch, own_z) = (s.channels, scored.depth, s.pitch(), scored.shift.is_empty());
    let group = |(index, grad)| {
        let [keys, constants, values, base] = side.group(index);
        Group {
            keys: (keys, turned(s, keys, depth)),
            values: (values, turned(s, values, c)),
            constants: to_base_two(s, constants),
            base,
            grad,
        }
    };
    let groups: Vec<_> = grad.par_chunks_exact(s.rows * c).enumerate().map(group).collect();
    let mut dx = Buffer::any(x.len());
    let mut dz = Buffer::any(if own_z { scored.x.len() } else { 0 });
    // Where z is x, its places have no width.
    let places = [(&mut dx[..], c), (&mut dz[..], if own_z { depth } else { 0 })];
    let parts: Vec<_> = stretches(places, s.rows, groups.len())
        .into_par_iter()
        .map(|Stretch { groups: own, first, grads: [dx, dz] }| {
            let at = (own.start, groups.len());
            let x = &entry(x, s.rows * c, at)[first * c..][..dx.len()];
            let z = entry(scored.x, s.rows * depth, at);
            let mut sums = side.sizes.map(|size| vec![0f32; own.len() * size]);
            let mut dnorm = vec![0f32; 2 * c];
            let zeros = |width: usize| vec![0f32; BLOCK * width];
            let mut block = Block {
                weights: zeros(pitch),
                grads: zeros(pitch),
                last: zeros(padded(s.heads)),
                sums: zeros(c),
                dsums: zeros(c),
            };
            let mut placed = Vec::new();
            dx.fill(0.0);
            dz.fill(0.0);
            for (index, (dx, x)) in dx.chunks_mut(BLOCK * c).zip(x.chunks(BLOCK * c)).enumerate() {
                let count = x.len() / c;
                let row = first + index * BLOCK;
                let mut rows = &z[row * depth..][..count * depth];
                if !own_z {
                    placed.resize(rows.len(), 0.0);
                    run(Sum {
                        out: &mut placed,
                        a: rows,
                        b: &scored.shift[row * depth..][..rows.len()],
                    });
                    rows = &placed;
                }
                for (index_of, group) in groups[own.clone()].iter().enumerate() {
                    let mut of_group = sums.each_mut().map(|sums| &mut sums[..]);
                    for (sums, size) in of_group.iter_mut().zip(side.sizes) {
                        *sums = &mut std::mem::take(sums)[index_of * size..][..size];
                    }
                    let [dkeys, dconstants, dvalues, dbase] = of_group;
                    let dz = own_z.then(|| &mut dz[index * BLOCK * depth..][..count * depth]);
                    let norm = (side.norm.0, side.norm.2);
                    let sums = [dkeys, dconstants, dvalues, dbase, &mut dnorm[..]];
                    group.add_gradients(
                        (s, norm),
                        (row, x, rows),
                        &mut block,
                        (&mut *dx, dz),
                        sums,
                    );
                }
            }
            (own.start, sums, dnorm)
        })
        .collect();
    let end: usize = side.parts.iter().map(|part| part.len()).sum();
    let mut dside = vec![0f32; end + 2 * c];
    for (group, sums, dnorm) in parts {
        let mut start = 0;
        for ((sums, part), size) in sums.iter().zip(side.parts).zip(side.sizes) {
            add(&mut dside[start + group * size..], sums);
            start += part.len();
        }
        add(&mut dside[end..], &dnorm);
    }
    Gradients { x: dx, scored: dz, side: dside }
}
