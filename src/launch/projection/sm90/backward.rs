//! The gradients of projections with LoRA on Hopper: that of x by `kernels/projection/sm90/bwd_input.cuh` or
//! `projection/sm90/bwd_ds.cuh`. What they do not cover is the portable kernels', and so are the thin products: dS, if not
//! made with dx, and the gradients of the adapters.

use crate::launch::bindings::{
    device_ptr, ProjectionBwdInputSm90Params, ProjectionPart, LOW_RANK_SPLIT_COLUMNS,
    LOW_RANK_SPLIT_RANK,
};
use crate::launch::projection::portable_backward::{backward_by, Between};
use crate::launch::projection::sm90::forward::{
    bits16, chosen, copies_take, persistent, tile, Hopper, Maps, Tile, BWD_INPUT, DEPTH, PIECE,
};
use crate::launch::projection::sm90::low_rank_split;
use crate::launch::projection::{BackwardOperands, Problem, Shapes};
use crate::launch::Launch;
use candle_core::{DType, Result};
use std::mem::offset_of;

/// In the place of the tile that makes dS, for ranks that it does not take.
const WITHOUT_DS: &str = "cooperative_128x192";

/// What [`crate::launch::projection::backward`] launches on Hopper; none where there is no kernel of Hopper for dx.
///
/// # Errors
/// As [`crate::launch::projection::backward`].
pub fn backward(
    problem: &Problem<'_>,
    dtype: DType,
    operands: &BackwardOperands<'_>,
    device: Hopper,
) -> Result<Option<Vec<Launch>>> {
    match chosen(BWD_INPUT, problem, dtype, &[problem.in_dim as u32], device.clusters)? {
        Some(tile) => backward_with(tile, problem, dtype, operands, device.multiprocessors),
        None => Ok(None),
    }
}

/// The backward with the tile of this name for dx on so many multiprocessors; none if the kernel does not cover the
/// problem.
///
/// # Errors
/// As [`backward`], and if there is no such tile.
pub fn backward_with(
    name: &str,
    problem: &Problem<'_>,
    dtype: DType,
    operands: &BackwardOperands<'_>,
    multiprocessors: u32,
) -> Result<Option<Vec<Launch>>> {
    let BackwardOperands { dout, dx, workspace, .. } = *operands;
    // a is not copied: the kernel reads it element by element.
    let mut addresses = vec![dout, dx, workspace];
    addresses.extend(operands.weights);
    let shapes = Shapes::new(problem)?;
    if !copies_take(&shapes, dtype, &addresses) {
        return Ok(None);
    }
    let tile = match tile(name)? {
        Tile { makes_ds: true, .. } if !low_rank_split::covers(&shapes) => tile(WITHOUT_DS)?,
        tile => tile,
    };
    let launches =
        backward_by(problem, dtype, operands, tile.makes_ds, |shapes, parts, between| {
            bwd_input(tile, shapes, dtype, parts, (between, dx), multiprocessors)
        })?;
    Ok(Some(launches))
}

/// dx at this address, from what is there.
fn bwd_input(
    tile: &Tile,
    shapes: &Shapes<'_>,
    dtype: DType,
    parts: [ProjectionPart; 3],
    (Between { g, ds, split }, dx): (Between, device_ptr),
    multiprocessors: u32,
) -> Result<Vec<Launch>> {
    type Params = ProjectionBwdInputSm90Params;
    let (rows, in_dim) = (shapes.problem.rows as u32, shapes.in_dim);
    let mut maps = Maps::default();
    for (index, part) in parts.iter().enumerate().take(shapes.problem.projections.len()) {
        let columns = (rows, part.out_dim, shapes.total);
        let g = bits16(g + 2 * u64::from(part.column), columns, (tile.rows, DEPTH))?;
        maps.push(offset_of!(Params, g), index, g);
        let weight =
            bits16(part.weight, (part.out_dim, in_dim, in_dim), (DEPTH / tile.cluster, DEPTH))?;
        maps.push(offset_of!(Params, weight), index, weight);
    }
    let mut launches = Vec::new();
    let mut unscale = 0;
    if tile.makes_ds {
        let split = low_rank_split::launch(shapes, dtype, &parts, split)?;
        for (index, _) in shapes.adapted() {
            let matrix = (parts[index].out_dim, LOW_RANK_SPLIT_COLUMNS, LOW_RANK_SPLIT_COLUMNS);
            let b = bits16(split.matrices[index], matrix, (DEPTH, LOW_RANK_SPLIT_RANK))?;
            maps.push(offset_of!(Params, b), index, b);
        }
        unscale = split.unscale;
        launches.extend(split.launch);
    }
    maps.push(offset_of!(Params, dx), 0, bits16(dx, (rows, in_dim, in_dim), PIECE)?);
    let tiles = tile.count(rows.into(), &[in_dim]);
    let mut params = Params {
        problem: shapes.bwd_input_params(parts, g, ds, dx),
        tiles,
        unscale,
        ..bytemuck::Zeroable::zeroed()
    };
    params.problem.column_tiles = tile.columns(&[in_dim]) as u32;
    let launch = persistent(BWD_INPUT, tile, dtype, (tiles, multiprocessors), &params, maps)?;
    // dS's kernel begins when g is there, so this one may begin with g.
    let begins_early = !tile.makes_ds && shapes.adapted().next().is_some();
    launches.push(Launch { begins_early, ..launch });
    Ok(launches)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::projection::sm90::forward::{BACKWARD_TILES, X2};
    use crate::launch::projection::{Activation, LoraProblem, ProjectionProblem, Small};
    use crate::launch::tensor_map::TensorMap;

    #[test]
    fn the_gradient_of_x_copies_g_and_the_weights_alone() -> Result<()> {
        let lora = LoraProblem { rank: 3, scaling: 1.0, dropout: None, bias: false };
        let part = |lora| ProjectionProblem { out_dim: 192, bias: true, lora };
        let parts = [part(Some(lora)), part(None)];
        let activation = Activation::Identity;
        let problem = Problem { rows: 1000, in_dim: 200, projections: &parts, activation };
        let operands = BackwardOperands {
            x: 256,
            weights: &[512, 768],
            small: Small::Flat(2052), // f32 of any alignment
            low_rank: 0,
            sum: 0,
            dout: 4096,
            dx: 8192,
            dsmall: 0,
            workspace: 1 << 16,
        };
        let backward = |tile, operands: &BackwardOperands<'_>| {
            backward_with(tile, &problem, DType::BF16, operands, 5)
        };
        for tile in BACKWARD_TILES {
            let launches = backward(tile, &operands)?.unwrap();
            let [before, dx] = &launches[..] else { panic!("{}", launches.len()) };
            let (kernel, maps) = match tile.ends_with("_ds") {
                true => ("low_rank_split_bf16", 2 + 2 + 1 + 1),
                false => ("low_rank_grad_64x16_bf16", 2 + 2 + 1),
            };
            assert_eq!(before.kernel, kernel);
            assert_eq!(dx.kernel, format!("projection_bwd_input_sm90_{tile}_bf16"));
            // Of the weights' depth, each block of a cluster of two loads half.
            let (cluster, grid, depth) = if tile.ends_with(X2) { (2, 4, 32) } else { (1, 5, 64) };
            assert_eq!((dx.cluster, dx.grid), (cluster, [grid, 1, 1]));
            let [g, weight] = [0, 1].map(|map| dx.tensor_maps[map].1.tile.as_slice());
            assert_eq!((g, weight), (&[64, 128][..], &[64, depth][..]));
            assert_eq!(dx.tensor_maps.len(), maps);
            let end = |(start, _): &(usize, TensorMap)| start + 128;
            assert!(dx.tensor_maps.iter().map(end).max() <= Some(dx.params.len()));
            for operands in [
                BackwardOperands { dout: 4104, ..operands },
                BackwardOperands { dx: 8200, ..operands },
                BackwardOperands { workspace: (1 << 16) + 4, ..operands },
                BackwardOperands { weights: &[512, 776], ..operands },
            ] {
                assert!(backward(tile, &operands)?.is_none());
            }
        }
        // dS alone, or of a rank that the kernel does not take, has its own.
        let kernels = |rank, operands: &BackwardOperands<'_>| {
            let lora = LoraProblem { rank, ..lora };
            let parts = [part(Some(lora))];
            let problem = Problem { projections: &parts, ..problem };
            let tile = "cooperative_128x192_ds";
            let launches = backward_with(tile, &problem, DType::F16, operands, 5)?;
            Result::Ok(launches.unwrap().into_iter().map(|l| l.kernel).take(2).collect::<Vec<_>>())
        };
        let operands = BackwardOperands { weights: &[512], ..operands };
        let names =
            ["low_rank_grad_64x64_f16", "projection_bwd_input_sm90_cooperative_128x192_f16"];
        assert_eq!(kernels(17, &operands)?, names);
        let alone = BackwardOperands { dx: 0, dsmall: 1 << 20, ..operands };
        assert_eq!(kernels(16, &alone)?[0], "low_rank_grad_64x16_f16");
        Ok(())
    }
}
