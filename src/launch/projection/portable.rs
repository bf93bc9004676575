//! Projections with LoRA: `kernels/projection/fwd.cuh`, `kernels/low_rank/low_rank.cuh`.
//!
//! The forward is one launch for S (none without LoRA) and one for the output. S, f32, is what the backward wants kept,
//! and with an activation the sum before it. The backward is in `portable_backward`.

use crate::launch::bindings::{
    device_ptr, LowRankParams, LowRankPart, ProjectionParams, ProjectionPart, ACTIVATION_GELU,
    ACTIVATION_IDENTITY, ACTIVATION_RELU, LOW_RANK_THREADS, PROJECTION_PARTS,
};
use crate::launch::projection::tiles::{self, LowRankTile, Product, Tile};
use crate::launch::slots::mask;
use crate::launch::{Gpu, Launch};
use crate::problem::{small_layout, small_layout_of};
use candle_core::{bail, DType, Result};
use std::ops::Range;

pub use crate::problem::{Activation, LoraProblem, ProjectionProblem, SmallLayout};

/// Up to three projections of one input `[rows, in_dim]` into packed columns, all operands contiguous.
#[derive(Clone, Copy, Debug)]
pub struct Problem<'a> {
    /// Rows of the input: all dimensions but the last.
    pub rows: usize,
    /// Width of the input.
    pub in_dim: usize,
    /// One to three.
    pub projections: &'a [ProjectionProblem],
    /// Applied to the sums.
    pub activation: Activation,
}

impl<'a> Problem<'a> {
    /// Projections of an input of this shape.
    pub fn of(
        x_dims: &[usize],
        projections: &'a [ProjectionProblem],
        activation: Activation,
    ) -> Self {
        let in_dim = x_dims.last().copied().unwrap_or(1);
        let rows = x_dims.iter().product::<usize>() / in_dim.max(1);
        Self { rows, in_dim, projections, activation }
    }
}

/// The shapes in the units of the kernels, checked.
pub(in crate::launch) struct Shapes<'a> {
    pub(in crate::launch) problem: &'a Problem<'a>,
    pub(in crate::launch) layouts: Vec<SmallLayout>,
    /// Length of the small tensors.
    pub(in crate::launch) small_len: usize,
    pub(in crate::launch) in_dim: u32,
    pub(in crate::launch) total: u32,
    activation: u32,
    /// Width of S: ranks, each up to a multiple of four, so that rows can be read in vectors.
    pub(in crate::launch) s_stride: u32,
    s_columns: Vec<u32>,
}

fn to_u32(what: &str, value: usize) -> Result<u32> {
    u32::try_from(value)
        .or_else(|_| bail!("projection: {what} of {value} is more than a kernel takes"))
}

/// Width of the packed output.
fn total(parts: &[ProjectionProblem]) -> usize {
    parts.iter().map(|part| part.out_dim).sum()
}

/// The activation as kernels take it.
///
/// # Errors
/// - kernels do not take the shapes or the activation.
fn check(problem: &Problem<'_>) -> Result<u32> {
    let Problem { rows, in_dim, projections: parts, .. } = *problem;
    let total = total(parts);
    let empty = rows == 0 || in_dim == 0 || parts.iter().any(|part| part.out_dim == 0);
    if empty || parts.is_empty() || parts.len() > PROJECTION_PARTS as usize {
        let count = parts.len();
        bail!(
            "projection: kernels want 1 to 3 projections that are not empty, got {count} of [{rows}, {in_dim}] -> \
             {total}"
        )
    }
    for (what, size) in [("rows", rows), ("in_dim", in_dim), ("out_dim", total)] {
        to_u32(what, size)?;
    }
    for lora in parts.iter().filter_map(|part| part.lora) {
        to_u32("rank", lora.rank)?;
    }
    Ok(match problem.activation {
        Activation::Identity => ACTIVATION_IDENTITY,
        Activation::Gelu => ACTIVATION_GELU,
        Activation::Relu => ACTIVATION_RELU,
        other => bail!("projection: no kernel computes {other:?}"),
    })
}

impl<'a> Shapes<'a> {
    pub(in crate::launch) fn new(problem: &'a Problem<'a>) -> Result<Self> {
        let activation = check(problem)?;
        let Problem { in_dim, projections: parts, .. } = *problem;
        let (layouts, small_len) = small_layout(in_dim, parts);
        let mut s_stride = 0;
        let mut s_columns = Vec::new();
        for part in parts {
            s_columns.push(s_stride);
            s_stride += part.lora.map_or(0, |lora| lora.rank as u32).next_multiple_of(4);
        }
        let (in_dim, total) = (in_dim as u32, total(parts) as u32);
        Ok(Self { problem, layouts, small_len, in_dim, total, activation, s_stride, s_columns })
    }

    pub(in crate::launch) fn rows(&self) -> u64 {
        self.problem.rows as u64
    }

    /// Bytes of S, or dS.
    pub(in crate::launch) fn s_bytes(&self) -> usize {
        4 * low_rank_len(self.problem)
    }

    /// The projections that have LoRA, by their places.
    pub(in crate::launch) fn adapted(&self) -> impl Iterator<Item = (usize, LoraProblem)> + '_ {
        let parts = self.problem.projections.iter().enumerate();
        parts.filter_map(|(index, part)| Some((index, part.lora?)))
    }

    /// First column in packed tensors.
    pub(in crate::launch) fn column(&self, index: usize) -> u32 {
        self.problem.projections[..index].iter().map(|part| part.out_dim as u32).sum()
    }

    pub(in crate::launch) fn parts(
        &self,
        weights: &[device_ptr],
        small: Small<'_>,
    ) -> Result<[ProjectionPart; 3]> {
        let problems = self.problem.projections;
        if weights.len() != problems.len() {
            bail!("projection: {} weights for {} projections", weights.len(), problems.len())
        }
        let mut separate = match small {
            Small::Flat(_) => &[],
            Small::Separate(tensors) => tensors,
        }
        .iter();
        // Those that are there, in the order of the layout.
        let mut next = |range: &Range<usize>| match (small, separate.next()) {
            (Small::Flat(first), _) => Ok((first + 4 * range.start as u64, 0)),
            (Small::Separate(_), Some(tensor)) => Ok((tensor.at, u32::from(tensor.typed))),
            (Small::Separate(_), None) => bail!("projection: too few small tensors"),
        };
        let mut parts = [ProjectionPart::default(); 3];
        for (index, (part, problem)) in parts.iter_mut().zip(problems).enumerate() {
            let layout = &self.layouts[index];
            *part = ProjectionPart {
                weight: weights[index],
                out_dim: problem.out_dim as u32,
                column: self.column(index),
                s_column: self.s_columns[index],
                mask: mask(None),
                ..Default::default()
            };
            if let Some(range) = &layout.bias {
                (part.bias, part.bias_typed) = next(range)?;
            }
            if let Some(lora) = problem.lora {
                (part.a, _) = next(&layout.a)?;
                (part.b, _) = next(&layout.b)?;
                part.rank = lora.rank as u32;
                part.scaling = lora.scaling;
                part.mask = mask(lora.dropout);
            }
            if let Some(range) = &layout.lora_bias {
                (part.lora_bias, part.lora_bias_typed) = next(range)?;
            }
        }
        Ok(parts)
    }

    /// Where the gradients of the trained small tensors lie in one flat tensor, and their length.
    pub(in crate::launch) fn gradients(&self, small: Small<'_>) -> (Vec<SmallLayout>, usize) {
        let mut tensors = match small {
            Small::Flat(_) => &[],
            Small::Separate(tensors) => tensors,
        }
        .iter();
        let is_trained = || tensors.next().is_none_or(|tensor| tensor.trained);
        small_layout_of(self.problem.in_dim, self.problem.projections, is_trained)
    }

    /// The params that both directions share.
    pub(in crate::launch) fn params(&self) -> ProjectionParams {
        ProjectionParams {
            rows: self.problem.rows as u32,
            in_dim: self.in_dim,
            total: self.total,
            s_stride: self.s_stride,
            activation: self.activation,
            ..Default::default()
        }
    }

    /// Those of the forward.
    pub(in crate::launch) fn forward_params(
        &self,
        parts: [ProjectionPart; 3],
        operands: &ForwardOperands<'_>,
    ) -> ProjectionParams {
        ProjectionParams {
            left: operands.x,
            low_rank: operands.low_rank,
            residual: operands.residual,
            sum: operands.sum,
            out: operands.out,
            parts,
            ..self.params()
        }
    }
}

/// A projection kernel whose blocks make a tile each, of an output in these widths.
pub(in crate::launch) struct Tiled<'a> {
    pub(in crate::launch) family: &'static str,
    pub(in crate::launch) tile: &'a Tile,
    pub(in crate::launch) shared_bytes: u32,
    pub(in crate::launch) widths: &'a [u64],
}

impl Tiled<'_> {
    pub(in crate::launch) fn launch(
        &self,
        dtype: DType,
        params: ProjectionParams,
    ) -> Result<Launch> {
        let &Self { family, tile, shared_bytes, widths } = self;
        let column_tiles = tile.columns(widths);
        let grid = [column_tiles * tile.row_blocks(params.rows.into()), 1, 1];
        let params = ProjectionParams { column_tiles: column_tiles as u32, ..params };
        let launch = Launch::new(&format!("{family}_{tile}"), dtype, grid, tile.threads, &params)?;
        Ok(Launch { shared_bytes, ..launch })
    }
}

/// One of the thin products. None if there is nothing to do.
pub(in crate::launch) fn low_rank(
    product: Product,
    dtype: DType,
    parts: &[LowRankPart],
    (splits, split_depth, split_stride): (u64, u32, u64),
) -> Result<Option<Launch>> {
    let Some(rank) = parts.iter().map(|part| part.size_j).max() else { return Ok(None) };
    let tile = LowRankTile::pick(product, dtype, rank)?;
    let blocks = |size: fn(&LowRankPart) -> u32, tile: u64| {
        parts.iter().map(|part| u64::from(size(part)).div_ceil(tile)).max().unwrap_or(1)
    };
    let grid = [
        blocks(|part| part.size_i, LowRankTile::ROWS),
        blocks(|part| part.out_j, tile.cols.into()),
        parts.len() as u64 * splits,
    ];
    let mut params =
        LowRankParams { split_stride, splits: splits as u32, split_depth, ..Default::default() };
    params.parts[..parts.len()].copy_from_slice(parts);
    let family = format!("low_rank_{product}_{}x{}", LowRankTile::ROWS, tile.cols);
    let launch = Launch::new(&family, dtype, grid, LOW_RANK_THREADS, &params)?;
    Ok(Some(Launch { shared_bytes: tile.bytes, ..launch }))
}

/// Whether there are kernels for this problem; without, the composed graph computes it.
pub fn covers(problem: &Problem<'_>, dtype: DType) -> bool {
    crate::launch::dtype_name("projection", dtype).is_ok() && check(problem).is_ok()
}

/// f32 elements of S, which the forward writes and the backward reads; 0 without LoRA. Its layout is the kernels' own.
pub fn low_rank_len(problem: &Problem<'_>) -> usize {
    let ranks = problem.projections.iter().filter_map(|p| p.lora).map(|lora| lora.rank);
    problem.rows * ranks.map(|rank| rank.next_multiple_of(4)).sum::<usize>()
}

/// Where the projections' small tensors lie.
#[derive(Clone, Copy, Debug)]
pub enum Small<'a> {
    /// As one tensor in f32, as `problem::small_layout` has them, all of them trained.
    Flat(device_ptr),
    /// Each by itself, those that are there in the order of `problem::small_layout`.
    Separate(&'a [SmallTensor]),
}

/// A small tensor by itself.
#[derive(Clone, Copy, Debug)]
pub struct SmallTensor {
    /// Its address.
    pub at: device_ptr,
    /// Whether its elements are of the problem's dtype, which biases' may be; else they are f32.
    pub typed: bool,
    /// Whether its gradient is wanted.
    pub trained: bool,
}

/// The addresses of the forward's operands; 0 is absent.
#[derive(Clone, Copy, Debug)]
pub struct ForwardOperands<'a> {
    /// `[rows, in_dim]`
    pub x: device_ptr,
    /// Weight of each projection, `[out_dim, in_dim]`.
    pub weights: &'a [device_ptr],
    /// Biases and adapters.
    pub small: Small<'a>,
    /// `[rows, out_dims]`; may be absent.
    pub residual: device_ptr,
    /// Output `[rows, out_dims]`.
    pub out: device_ptr,
    /// Output, [`low_rank_len`] f32; absent without LoRA.
    pub low_rank: device_ptr,
    /// Output `[rows, out_dims]`: what the activation is applied to; absent if it is not kept.
    pub sum: device_ptr,
}

/// The forward: S and the output, in this order.
///
/// # Errors
/// On other dtypes than f32, f16 and bf16, and on shapes that no kernel takes.
pub fn forward(
    problem: &Problem<'_>,
    dtype: DType,
    operands: &ForwardOperands<'_>,
    gpu: &Gpu,
) -> Result<Vec<Launch>> {
    let widths: Vec<u64> = problem.projections.iter().map(|part| part.out_dim as u64).collect();
    forward_with(tiles::pick(problem.rows as u64, &widths, gpu), problem, dtype, operands)
}

/// The launch for S; none without LoRA.
pub(in crate::launch) fn low_rank_input(
    shapes: &Shapes<'_>,
    dtype: DType,
    parts: &[ProjectionPart; 3],
    operands: &ForwardOperands<'_>,
) -> Result<Option<Launch>> {
    let products: Vec<_> = shapes
        .adapted()
        .map(|(index, lora)| LowRankPart {
            left: operands.x,
            right: parts[index].a,
            out: operands.low_rank + 4 * u64::from(parts[index].s_column),
            size_i: shapes.problem.rows as u32,
            size_j: lora.rank as u32,
            out_j: (lora.rank as u32).next_multiple_of(4),
            depth: shapes.in_dim,
            left_stride: shapes.in_dim,
            right_stride: shapes.in_dim,
            out_stride_i: shapes.s_stride,
            out_stride_j: 1,
            scale: lora.scaling,
            mask: parts[index].mask,
        })
        .collect();
    low_rank(Product::Input, dtype, &products, (1, shapes.in_dim, 0))
}

/// The forward with this tile.
///
/// # Errors
/// As [`forward`].
pub fn forward_with(
    tile: &Tile,
    problem: &Problem<'_>,
    dtype: DType,
    operands: &ForwardOperands<'_>,
) -> Result<Vec<Launch>> {
    let shapes = Shapes::new(problem)?;
    let parts = shapes.parts(operands.weights, operands.small)?;
    let s = low_rank_input(&shapes, dtype, &parts, operands)?;
    let widths: Vec<u64> = problem.projections.iter().map(|part| part.out_dim as u64).collect();
    let (family, shared_bytes) = ("projection_fwd", tile.forward_bytes);
    let kernel = Tiled { family, tile, shared_bytes, widths: &widths };
    let out = kernel.launch(dtype, shapes.forward_params(parts, operands))?;
    Ok(s.into_iter().chain([out]).collect())
}

#[cfg(test)]
mod tests {
    use super::super::{backward, workspace_bytes, BackwardOperands};
    use super::*;

    fn part(out_dim: usize, rank: usize) -> ProjectionProblem {
        let lora = LoraProblem { rank, scaling: 1.0, dropout: None, bias: false };
        ProjectionProblem { out_dim, bias: true, lora: (rank > 0).then_some(lora) }
    }

    fn problem(rows: usize, in_dim: usize, parts: &[ProjectionProblem]) -> Problem<'_> {
        Problem { rows, in_dim, projections: parts, activation: Activation::Identity }
    }

    const OPERANDS: ForwardOperands<'_> = ForwardOperands {
        x: 256,
        weights: &[512, 768, 1024],
        small: Small::Flat(2048),
        residual: 0,
        out: 4096,
        low_rank: 8192,
        sum: 0,
    };

    fn names(launches: &[Launch]) -> Vec<&str> {
        launches.iter().map(|launch| launch.kernel.as_str()).collect()
    }

    #[test]
    fn each_part_has_its_own_column_tiles() -> Result<()> {
        let parts = [part(100, 0), part(130, 0), part(64, 0)];
        let expected = [(1 + 2 + 1, 81920), (2 + 3 + 1, 40960)];
        for (tile, (tiles, shared)) in tiles::TILES.iter().zip(expected) {
            let launches = forward_with(tile, &problem(200, 50, &parts), DType::F16, &OPERANDS)?;
            let rows = 200u32.div_ceil(tile.rows);
            assert_eq!(launches[0].grid, [rows * tiles, 1, 1]);
            assert_eq!((launches.len(), launches[0].shared_bytes), (1, shared));
        }
        Ok(())
    }

    #[test]
    fn s_is_computed_first_for_the_adapted_parts_alone() -> Result<()> {
        let parts = [part(64, 3), part(64, 0), part(64, 17)];
        let problem = problem(100, 64, &parts);
        // Ranks are rounded up to 4 and 20.
        assert_eq!(low_rank_len(&problem), 100 * 24);
        let launches = forward(&problem, DType::BF16, &OPERANDS, &Gpu::H100)?;
        assert_eq!(names(&launches), ["low_rank_input_64x64_bf16", "projection_fwd_64x64_bf16"]);
        assert_eq!(launches[0].grid, [2, 1, 2]);
        Ok(())
    }

    #[test]
    fn the_backward_makes_what_is_wanted() -> Result<()> {
        let parts = [part(64, 16), part(64, 0), part(64, 16)];
        let problem = problem(4096, 64, &parts);
        let operands = BackwardOperands {
            x: 256,
            weights: OPERANDS.weights,
            small: Small::Flat(2048),
            low_rank: 4096,
            sum: 0,
            dout: 8192,
            dx: 16384,
            dsmall: 0,
            workspace: 32768,
        };
        let launches = backward(&problem, DType::F16, &operands, &Gpu::H100)?;
        assert_eq!(names(&launches), ["low_rank_grad_64x16_f16", "projection_bwd_input_64x64_f16"]);
        assert_eq!(low_rank_len(&problem), 4096 * 32);
        let operands = BackwardOperands { dx: 0, dsmall: 16384, ..operands };
        let launches = backward(&problem, DType::F16, &operands, &Gpu::H100)?;
        let weight = "low_rank_weight_64x16_f16";
        let (ds, biases) = ("low_rank_grad_64x16_f16", "projection_bwd_bias_f16");
        let expected = [ds, weight, weight, biases, "sum_partials_f32"];
        assert_eq!(names(&launches), expected);
        // 32 splits of 128 rows, for each of two adapters.
        assert_eq!(launches[1].grid, [1, 1, 64]);
        let small = 3 * 64 + 2 * 2 * 16 * 64;
        for dtype in [DType::F16, DType::F32] {
            assert_eq!(workspace_bytes(&problem, dtype), 4 * (4096 * 32 + 32 * small));
        }
        let operands = BackwardOperands { dsmall: 0, ..operands };
        assert!(backward(&problem, DType::F16, &operands, &Gpu::H100)?.is_empty());
        Ok(())
    }

    #[test]
    fn what_no_kernel_takes_is_refused() {
        let parts = [part(64, 0); 4];
        for problem in [problem(5, 8, &parts), problem(0, 8, &parts[..1]), problem(5, 8, &[])] {
            assert!(!covers(&problem, DType::F32));
            let refused = forward(&problem, DType::F32, &OPERANDS, &Gpu::H100);
            let message = refused.unwrap_err().to_string();
            assert!(message.contains("1 to 3 projections"), "{message}");
        }
        let two = problem(5, 8, &parts[..2]);
        assert!(covers(&two, DType::F32) && !covers(&two, DType::F64));
        let refused = forward(&two, DType::F32, &OPERANDS, &Gpu::H100);
        assert!(refused.is_err(), "three weights for two");
    }
}
