//! The gradients of projections with LoRA: `kernels/projection/bwd_input.cuh`, `kernels/projection/bwd.cuh`,
//! `kernels/low_rank/low_rank.cuh`.
//!
//! ```text
//! g = grad act'(sum)        only with an activation
//! dS                        if anything is adapted
//! dx                        if wanted
//! dA, dB, biases            in partial sums over splits of the rows, laid out as the small tensors; then their sum
//! ```

use crate::launch::bindings::{
    device_ptr, ActivationGradParams, BiasGradParams, BiasGradPart, LowRankPart, ProjectionParams,
    ProjectionPart, ACTIVATION_GRAD_THREADS, BIAS_GRAD_SHARED_BYTES, BIAS_GRAD_WARPS,
    PROJECTION_PARTS,
};
use crate::launch::projection::portable::{low_rank, Activation, Problem, Shapes, Small, Tiled};
use crate::launch::projection::tiles::{self, Product, Tile};
use crate::launch::slots::mask;
use crate::launch::{sum_partials, Gpu, Launch};
use crate::problem::SmallLayout;
use candle_core::{bail, DType, Result};
use std::ops::Range;

const WARP: u64 = 32;
/// Fewer rows are not worth a split of their own.
const SPLIT_ROWS: u64 = 128;
/// More splits would fill no GPU better, and write more partial sums.
const MOST_SPLITS: u64 = 32;
/// Elements of partial sums, at most: 64 MB. Large adapters have blocks enough with fewer splits.
const MOST_PARTIALS: u64 = 1 << 24;

/// The addresses of the backward's operands; 0 is absent.
#[derive(Clone, Copy, Debug)]
pub struct BackwardOperands<'a> {
    /// As in the forward.
    pub x: device_ptr,
    /// As in the forward.
    pub weights: &'a [device_ptr],
    /// As in the forward.
    pub small: Small<'a>,
    /// The forward's output.
    pub low_rank: device_ptr,
    /// The forward's output; absent without an activation.
    pub sum: device_ptr,
    /// The gradient of `out`.
    pub dout: device_ptr,
    /// Output, as `x`; absent if it is not wanted.
    pub dx: device_ptr,
    /// Output: the gradients of the trained small tensors, in order, f32; absent if they are not wanted.
    pub dsmall: device_ptr,
    /// [`workspace_bytes`] bytes.
    pub workspace: device_ptr,
}

/// Where things lie in the workspace, in bytes.
struct Workspace {
    ds: u64,
    partials: u64,
    end: u64,
    splits: u64,
    split_rows: u64,
}

impl Shapes<'_> {
    /// The params of dx.
    pub(in crate::launch) fn bwd_input_params(&self, operands: &InputGrad) -> ProjectionParams {
        let &InputGrad { parts, g, ds, dx } = operands;
        ProjectionParams { left: g, low_rank: ds, out: dx, parts, ..self.params() }
    }
}

impl Workspace {
    fn new(shapes: &Shapes<'_>, dtype: DType) -> Self {
        let align = |bytes: u64| bytes.next_multiple_of(256);
        let rows = shapes.rows();
        let g = match shapes.problem.activation {
            Activation::Identity => 0,
            _ => rows * u64::from(shapes.total) * dtype.size_in_bytes() as u64,
        };
        let small_len = shapes.small_len as u64;
        let splits = rows.div_ceil(SPLIT_ROWS).min(MOST_SPLITS);
        let splits = splits.min((MOST_PARTIALS / small_len.max(1)).max(1));
        let split_rows = rows.div_ceil(splits).next_multiple_of(WARP);
        let splits = rows.div_ceil(split_rows);
        let ds = align(g);
        let partials = ds + align(shapes.s_bytes() as u64);
        let end = partials + 4 * splits * small_len;
        Self { ds, partials, end, splits, split_rows }
    }
}

/// Scratch memory of the backward; 0 for what no kernel takes.
pub fn workspace_bytes(problem: &Problem<'_>, dtype: DType) -> usize {
    Shapes::new(problem).map_or(0, |shapes| Workspace::new(&shapes, dtype).end as usize)
}

/// The gradients that are wanted, in launches to run in this order.
///
/// # Errors
/// On other dtypes than f32, f16 and bf16, on shapes that no kernel takes, and if the sum before an activation is
/// absent.
pub fn backward(
    problem: &Problem<'_>,
    dtype: DType,
    operands: &BackwardOperands<'_>,
    gpu: &Gpu,
) -> Result<Vec<Launch>> {
    let tile = tiles::pick(problem.rows as u64, &[problem.in_dim as u64], gpu);
    backward_with(tile, problem, dtype, operands)
}

/// The backward with this tile for dx.
///
/// # Errors
/// As [`backward`].
pub fn backward_with(
    tile: &Tile,
    problem: &Problem<'_>,
    dtype: DType,
    operands: &BackwardOperands<'_>,
) -> Result<Vec<Launch>> {
    backward_by(problem, dtype, operands, |shapes, operands| {
        let (family, widths) = ("projection_bwd_input", &[u64::from(shapes.in_dim)]);
        let kernel = Tiled { family, tile, shared_bytes: tile.backward_bytes, widths };
        kernel.launch(dtype, shapes.bwd_input_params(operands))
    })
}

/// The operands of the gradient of x.
pub(in crate::launch) struct InputGrad {
    /// The projections, with their weights and adapters.
    pub(in crate::launch) parts: [ProjectionPart; 3],
    /// The gradient of the sums.
    pub(in crate::launch) g: device_ptr,
    /// dS
    pub(in crate::launch) ds: device_ptr,
    /// Output.
    pub(in crate::launch) dx: device_ptr,
}

/// The backward with dx by this launch.
///
/// # Errors
/// As [`backward`].
pub(in crate::launch) fn backward_by(
    problem: &Problem<'_>,
    dtype: DType,
    operands: &BackwardOperands<'_>,
    bwd_input: impl FnOnce(&Shapes<'_>, &InputGrad) -> Result<Launch>,
) -> Result<Vec<Launch>> {
    let shapes = Shapes::new(problem)?;
    let (layouts, small_len) = shapes.gradients(operands.small);
    let want_small = operands.dsmall != 0 && small_len > 0;
    let space = Workspace::new(&shapes, dtype);
    let parts = shapes.parts(operands.weights, operands.small)?;
    let mut launches = Vec::new();
    if operands.dx == 0 && !want_small {
        return Ok(launches);
    }

    let mut g = operands.dout;
    if problem.activation != Activation::Identity {
        if operands.sum == 0 {
            bail!("projection: the backward of an activation wants the sum before it")
        }
        g = operands.workspace;
        launches.push(activation_grad(&shapes, dtype, operands)?);
    }
    let ds = operands.workspace + space.ds;
    let g_of = |column: u32| g + u64::from(column) * dtype.size_in_bytes() as u64;
    let none = mask(None);
    let grads: Vec<_> = shapes
        .adapted()
        .map(|(index, lora)| LowRankPart {
            left: g_of(parts[index].column),
            right: parts[index].b,
            out: ds + 4 * u64::from(parts[index].s_column),
            size_i: problem.rows as u32,
            size_j: lora.rank as u32,
            out_j: (lora.rank as u32).next_multiple_of(4),
            depth: parts[index].out_dim,
            left_stride: shapes.total,
            right_stride: lora.rank as u32,
            out_stride_i: shapes.s_stride,
            out_stride_j: 1,
            scale: lora.scaling,
            mask: none,
        })
        .collect();
    let depth = problem.projections.iter().map(|part| part.out_dim as u32).max().unwrap_or(0);
    launches.extend(low_rank(Product::Grad, dtype, &grads, (1, depth, 0))?);
    if operands.dx != 0 {
        launches.push(bwd_input(&shapes, &InputGrad { parts, g, ds, dx: operands.dx })?);
    }

    if !want_small {
        return Ok(launches);
    }
    let partials = operands.workspace + space.partials;
    let small_len = small_len as u64;
    let partial = |start: usize| partials + 4 * start as u64;
    let split = (space.splits, space.split_rows as u32, small_len);
    // dA, transposed: the wide side first.
    let a_grads: Vec<_> = shapes
        .adapted()
        .filter(|(index, _)| !layouts[*index].a.is_empty())
        .map(|(index, lora)| LowRankPart {
            left: operands.x,
            right: ds + 4 * u64::from(parts[index].s_column),
            out: partial(layouts[index].a.start),
            size_i: shapes.in_dim,
            size_j: lora.rank as u32,
            out_j: lora.rank as u32,
            depth: problem.rows as u32,
            left_stride: shapes.in_dim,
            right_stride: shapes.s_stride,
            out_stride_i: 1,
            out_stride_j: shapes.in_dim,
            scale: 1.0,
            mask: parts[index].mask,
        })
        .collect();
    launches.extend(low_rank(Product::Weight, dtype, &a_grads, split)?);
    // dB: S carries the scaling.
    let b_grads: Vec<_> = shapes
        .adapted()
        .filter(|(index, _)| !layouts[*index].b.is_empty())
        .map(|(index, lora)| LowRankPart {
            left: g_of(parts[index].column),
            right: operands.low_rank + 4 * u64::from(parts[index].s_column),
            out: partial(layouts[index].b.start),
            size_i: parts[index].out_dim,
            size_j: lora.rank as u32,
            out_j: lora.rank as u32,
            depth: problem.rows as u32,
            left_stride: shapes.total,
            right_stride: shapes.s_stride,
            out_stride_i: lora.rank as u32,
            out_stride_j: 1,
            scale: 1.0,
            mask: none,
        })
        .collect();
    launches.extend(low_rank(Product::Weight, dtype, &b_grads, split)?);
    let biases = BiasGrads { layouts: &layouts, small_len, g, partials };
    launches.extend(bias_grad(&shapes, dtype, &biases, &space)?);
    launches.push(sum_partials::launch(
        DType::F32,
        partials,
        operands.dsmall,
        space.splits,
        small_len,
    )?);
    Ok(launches)
}

/// g, into the beginning of the workspace.
fn activation_grad(
    shapes: &Shapes<'_>,
    dtype: DType,
    operands: &BackwardOperands<'_>,
) -> Result<Launch> {
    let size = shapes.rows() * u64::from(shapes.total);
    let params = ActivationGradParams {
        grad: operands.dout,
        sum: operands.sum,
        g: operands.workspace,
        size,
        activation: shapes.params().activation.into(),
    };
    let per_block = u64::from(ACTIVATION_GRAD_THREADS) * 16 / dtype.size_in_bytes() as u64;
    let grid = [size.div_ceil(per_block), 1, 1];
    Launch::new("projection_bwd_activation", dtype, grid, ACTIVATION_GRAD_THREADS, &params)
}

/// The gradients of the sums, and where those of the biases go.
struct BiasGrads<'a> {
    layouts: &'a [SmallLayout],
    small_len: u64,
    g: device_ptr,
    partials: device_ptr,
}

/// The partial sums of the biases' gradients; none where no bias is trained.
fn bias_grad(
    shapes: &Shapes<'_>,
    dtype: DType,
    &BiasGrads { layouts, small_len, g, partials }: &BiasGrads<'_>,
    space: &Workspace,
) -> Result<Option<Launch>> {
    let at = |range: &Option<Range<usize>>| {
        let trained = range.as_ref().filter(|range| !range.is_empty());
        trained.map_or(0, |range| partials + 4 * range.start as u64)
    };
    let mut parts = Vec::new();
    for (index, (problem, layout)) in shapes.problem.projections.iter().zip(layouts).enumerate() {
        let (bias, lora_bias) = (at(&layout.bias), at(&layout.lora_bias));
        if bias != 0 || lora_bias != 0 {
            parts.push(BiasGradPart {
                bias,
                lora_bias,
                column: shapes.column(index),
                out_dim: problem.out_dim as u32,
                scaling: problem.lora.map_or(1.0, |lora| lora.scaling),
                reserved: 0,
            });
        }
    }
    let Some(widest) = parts.iter().map(|part| u64::from(part.out_dim)).max() else {
        return Ok(None);
    };
    if parts.len() > PROJECTION_PARTS as usize {
        bail!("projection_bwd_bias: {} projections", parts.len())
    }
    let mut params = BiasGradParams {
        g,
        rows: shapes.rows(),
        split_rows: space.split_rows,
        split_stride: small_len,
        total: shapes.total.into(),
        ..Default::default()
    };
    params.parts[..parts.len()].copy_from_slice(&parts);
    let grid = [space.splits, widest.div_ceil(WARP), parts.len() as u64];
    let launch =
        Launch::new("projection_bwd_bias", dtype, grid, BIAS_GRAD_WARPS * WARP as u32, &params)?;
    Ok(Some(Launch { shared_bytes: BIAS_GRAD_SHARED_BYTES, ..launch }))
}
