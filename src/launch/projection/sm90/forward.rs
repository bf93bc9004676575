//! Projections with LoRA on Hopper: the tiles of `kernels/projection/sm90/common.cuh`, and the launch of the forward,
//! `kernels/projection/sm90/fwd.cuh`. The portable kernels serve the other problems, and compute the thin product S.
//!
//! A kernel's blocks stay, one on each multiprocessor, and make tile after tile.

use crate::launch::bindings::{
    self, device_ptr, EncodedTensorMap, ProjectionFwdSm90Params, PROJECTION_SM90_THREADS,
};
use crate::launch::projection::portable::{low_rank_input, ForwardOperands, Problem, Shapes};
use crate::launch::projection::sm90::tiles::{pick, Pass, Tile};
use crate::launch::tensor_map::{Element, TensorMap, LONGEST};
use crate::launch::{Gpu, Launch};
use candle_core::{DType, Result};
use std::mem::{offset_of, size_of};

/// Columns that a warp stores at once, of 16 rows.
pub(in crate::launch) const PIECE: (u32, u32) = (16, 64);
/// Elements of a row of a stage: 128 bytes.
pub(in crate::launch) const DEPTH: u32 = 64;
const LOW_RANK_DEPTH: u32 = 32;

/// Whether the forward or the gradient of x is the kernels' for Hopper, for operands that bulk copies take. The
/// portable kernels take the problem.
pub(in crate::launch) fn covers(problem: &Problem<'_>, dtype: DType, gpu: &Gpu) -> bool {
    let has_tile = |pass, widths: &[u32]| pick(pass, problem.rows as u64, widths, gpu).is_some();
    copies_take(problem, dtype, &[])
        && (has_tile(Pass::Forward, &widths(problem))
            || has_tile(Pass::BackwardInput, &[problem.in_dim as u32]))
}

fn widths(problem: &Problem<'_>) -> Vec<u32> {
    problem.projections.iter().map(|part| part.out_dim as u32).collect()
}

/// Whether bulk copies take the matrices: 16 bits an element, rows and addresses of multiples of 16 bytes, sizes that a
/// coordinate counts.
pub(in crate::launch) fn copies_take(
    &Problem { rows, in_dim, projections, .. }: &Problem<'_>,
    dtype: DType,
    addresses: &[device_ptr],
) -> bool {
    let widths = projections.iter().map(|part| part.out_dim);
    matches!(dtype, DType::F16 | DType::BF16)
        && in_dim.is_multiple_of(8)
        && widths.clone().all(|width| width.is_multiple_of(8))
        && addresses.iter().all(|address| address.is_multiple_of(16))
        && rows.max(in_dim).max(widths.sum()) <= LONGEST
}

/// Hopper launches of [`crate::launch::projection::forward`]; none where the kernels do not cover the problem, or the
/// table has no tile for it.
///
/// # Errors
/// On shapes that no kernel takes.
pub fn forward(
    problem: &Problem<'_>,
    dtype: DType,
    operands: &ForwardOperands<'_>,
    gpu: &Gpu,
) -> Result<Option<Vec<Launch>>> {
    match pick(Pass::Forward, problem.rows as u64, &widths(problem), gpu) {
        Some(tile) => forward_with(tile, problem, dtype, operands, gpu),
        None => Ok(None),
    }
}

/// The forward with this tile; none if the kernels do not cover the problem.
///
/// # Errors
/// As [`forward`].
pub fn forward_with(
    tile: &Tile,
    problem: &Problem<'_>,
    dtype: DType,
    operands: &ForwardOperands<'_>,
    gpu: &Gpu,
) -> Result<Option<Vec<Launch>>> {
    let shapes = Shapes::new(problem)?;
    let ForwardOperands { x, residual, out, low_rank, sum, .. } = *operands;
    let parts = shapes.parts(operands.weights, operands.small)?;
    let mut addresses = vec![x, residual, out, low_rank, sum];
    addresses.extend(parts.iter().flat_map(|part| [part.weight, part.b]));
    // Rows of b are its ranks.
    let ranks = shapes.adapted().all(|(_, lora)| lora.rank.is_multiple_of(4));
    if !ranks || !copies_take(problem, dtype, &addresses) {
        return Ok(None);
    }
    let (rows, in_dim, total) = (problem.rows as u32, shapes.in_dim, shapes.total);
    let widths = widths(problem);

    type Params = ProjectionFwdSm90Params;
    let mut maps = Maps::default();
    maps.push(offset_of!(Params, x), 0, bits16(x, (rows, in_dim, in_dim), (tile.rows, DEPTH))?);
    for (index, part) in parts.iter().enumerate().take(widths.len()) {
        let weight = (part.out_dim, in_dim, in_dim);
        let weight = bits16(part.weight, weight, (tile.cols / tile.cluster, DEPTH))?;
        maps.push(offset_of!(Params, weight), index, weight);
        if part.rank > 0 {
            let s = low_rank + 4 * u64::from(part.s_column);
            let s = tf32(s, (rows, part.rank, shapes.s_stride), (tile.rows, LOW_RANK_DEPTH))?;
            maps.push(offset_of!(Params, low_rank), index, s);
            let b = (part.out_dim, part.rank, part.rank);
            let b = tf32(part.b, b, (tile.cols / tile.cluster, LOW_RANK_DEPTH))?;
            maps.push(offset_of!(Params, b), index, b);
        }
        for (packed, at) in [
            (residual, offset_of!(Params, residual)),
            (sum, offset_of!(Params, sum)),
            (out, offset_of!(Params, out)),
        ] {
            if packed != 0 {
                let columns = packed + 2 * u64::from(part.column);
                maps.push(at, index, bits16(columns, (rows, part.out_dim, total), PIECE)?);
            }
        }
    }
    let tiles = tile.count(rows.into(), &widths);
    let mut params = Params {
        problem: shapes.forward_params(parts, operands),
        tiles,
        ..bytemuck::Zeroable::zeroed()
    };
    params.problem.column_tiles = tile.columns(&widths) as u32;
    let kernel = Persistent { pass: Pass::Forward, tile, tiles, gpu };
    let out = kernel.launch(dtype, &params, maps)?;
    let s = low_rank_input(&shapes, dtype, &parts, operands)?;
    // S's kernel begins when x is there, so this one may begin with x.
    let out = Launch { begins_early: gpu.early_launch && s.is_some(), ..out };
    Ok(Some(s.into_iter().chain([out]).collect()))
}

/// Tensor maps and where they stand.
#[derive(Default)]
pub(in crate::launch) struct Maps(Vec<(usize, TensorMap)>);

impl Maps {
    /// The map of this place of an array of them.
    pub(in crate::launch) fn push(&mut self, array: usize, index: usize, map: TensorMap) {
        self.0.push((array + index * size_of::<EncodedTensorMap>(), map));
    }
}

/// Rows, columns and stride of a matrix, and rows and columns of its tiles.
pub(in crate::launch) fn bits16(
    at: device_ptr,
    matrix: (u32, u32, u32),
    tile: (u32, u32),
) -> Result<TensorMap> {
    TensorMap::matrix(at, Element::Bits16, matrix, tile)
}

fn tf32(at: device_ptr, matrix: (u32, u32, u32), tile: (u32, u32)) -> Result<TensorMap> {
    TensorMap::matrix(at, Element::Tf32, matrix, tile)
}

/// A kernel that makes so many tiles with a block on each multiprocessor that there is work for, at least a cluster.
pub(in crate::launch) struct Persistent<'a> {
    pub(in crate::launch) pass: Pass,
    pub(in crate::launch) tile: &'a Tile,
    pub(in crate::launch) tiles: u64,
    pub(in crate::launch) gpu: &'a Gpu,
}

impl Persistent<'_> {
    pub(in crate::launch) fn launch<P: bindings::Params>(
        &self,
        dtype: DType,
        params: &P,
        maps: Maps,
    ) -> Result<Launch> {
        let &Tile { name, cluster, bytes: shared_bytes, .. } = self.tile;
        let clusters = (self.gpu.persistent_blocks() / u64::from(cluster)).max(1);
        let grid = [self.tiles.min(clusters) * u64::from(cluster), 1, 1];
        let family = format!("{}_{name}", self.pass.kernel());
        let launch = Launch::new(&family, dtype, grid, PROJECTION_SM90_THREADS, params)?;
        Ok(Launch { shared_bytes, cluster, tensor_maps: maps.0, ..launch })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::projection::{Activation, LoraProblem, ProjectionProblem, Small};

    #[test]
    fn a_launch_carries_the_maps_of_what_is_there() -> Result<()> {
        let lora = LoraProblem { rank: 16, scaling: 1.0, dropout: None, bias: false };
        let part = |lora| ProjectionProblem { out_dim: 192, bias: true, lora };
        let parts = [part(Some(lora)), part(None), part(Some(lora))];
        let activation = Activation::Identity;
        let problem = Problem { rows: 1000, in_dim: 64, projections: &parts, activation };
        let operands = ForwardOperands {
            x: 256,
            weights: &[512, 768, 1024],
            small: Small::Flat(2048),
            residual: 0,
            out: 4096,
            low_rank: 8192,
            sum: 0,
        };
        let five = Gpu { multiprocessors: 5, ..Gpu::H100 };
        let forward = |problem: &Problem<'_>, dtype, operands: &ForwardOperands<'_>| {
            forward_with(&Pass::Forward.tiles()[0], problem, dtype, operands, &five)
        };
        let launches = forward(&problem, DType::F16, &operands)?.unwrap();
        let [s, out] = &launches[..] else { panic!("{}", launches.len()) };
        assert_eq!(s.kernel, "low_rank_input_64x16_f16");
        assert_eq!(out.kernel, "projection_fwd_sm90_pingpong_128x192_f16");
        assert_eq!(out.grid, [5, 1, 1]);
        // x; three weights and outputs; S and b of two.
        assert_eq!(out.tensor_maps.len(), 1 + 3 + 3 + 4);
        let end = |(start, _): &(usize, TensorMap)| start + 128;
        assert!(out.tensor_maps.iter().map(end).max() <= Some(out.params.len()));
        // k begins 192 columns into the weight's rows' outputs, in a map of its own.
        let (_, k) = &out.tensor_maps[5];
        assert_eq!((k.address, k.dims()), (768, &[64, 192][..]));

        // A cluster of two loads the weights, and b, in halves, and is there as a whole.
        let tile = &Pass::Forward.tiles()[1];
        let launches = forward_with(tile, &problem, DType::F16, &operands, &five)?;
        let in_clusters = &launches.unwrap()[1];
        assert_eq!(in_clusters.kernel, "projection_fwd_sm90_pingpong_128x192_x2_f16");
        assert_eq!((out.cluster, in_clusters.cluster, in_clusters.grid), (1, 2, [4, 1, 1]));
        let tiles = |launch: &Launch| launch.tensor_maps.iter().map(|m| m.1.tile()[1]).collect();
        let (whole, halves): (Vec<_>, Vec<_>) = (tiles(out), tiles(in_clusters));
        assert_eq!(
            (&whole[..4], &halves[..4]),
            (&[128, 192, 128, 192][..], &[128, 96, 128, 96][..])
        );

        // Bulk copies refuse these addresses, which are not aligned.
        for operands in [
            ForwardOperands { x: 264, ..operands },
            ForwardOperands { out: 4104, ..operands },
            ForwardOperands { small: Small::Flat(2052), ..operands },
        ] {
            assert!(forward(&problem, DType::F16, &operands)?.is_none());
        }
        assert!(forward(&problem, DType::F32, &operands)?.is_none());
        let odd = Problem { in_dim: 63, ..problem };
        assert!(forward(&odd, DType::F16, &operands)?.is_none());
        // Rows that a coordinate counts, and one more.
        let long = |rows| Problem { rows, ..problem };
        assert!(forward(&long((1 << 31) - 1), DType::F16, &operands)?.is_some());
        assert!(forward(&long(1 << 31), DType::F16, &operands)?.is_none());
        Ok(())
    }
}
