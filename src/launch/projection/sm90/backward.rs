//! The gradients of projections with LoRA on Hopper: that of x by `kernels/projection/sm90/bwd_input.cuh`. The portable
//! kernels take what it does not cover, and the thin products: dS and the gradients of the adapters.

use crate::launch::bindings::ProjectionBwdInputSm90Params;
use crate::launch::projection::portable::{Problem, Shapes};
use crate::launch::projection::portable_backward::{backward_by, BackwardOperands, InputGrad};
use crate::launch::projection::sm90::forward::{
    bits16, copies_take, Maps, Persistent, DEPTH, PIECE,
};
use crate::launch::projection::sm90::tiles::{pick, Pass, Tile};
use crate::launch::{Gpu, Launch};
use candle_core::{DType, Result};
use std::mem::offset_of;

/// Hopper launches of [`crate::launch::projection::backward`]; none where Hopper has no kernel for dx.
///
/// # Errors
/// As [`crate::launch::projection::backward`].
pub fn backward(
    problem: &Problem<'_>,
    dtype: DType,
    operands: &BackwardOperands<'_>,
    gpu: &Gpu,
) -> Result<Option<Vec<Launch>>> {
    match pick(Pass::BackwardInput, problem.rows as u64, &[problem.in_dim as u32], gpu) {
        Some(tile) => backward_with(tile, problem, dtype, operands, gpu),
        None => Ok(None),
    }
}

/// The backward with this tile for dx; none if the kernel does not cover the problem.
///
/// # Errors
/// As [`backward`].
pub fn backward_with(
    tile: &Tile,
    problem: &Problem<'_>,
    dtype: DType,
    operands: &BackwardOperands<'_>,
    gpu: &Gpu,
) -> Result<Option<Vec<Launch>>> {
    let BackwardOperands { dout, dx, workspace, .. } = *operands;
    // a is not copied: the kernel reads it element by element.
    let mut addresses = vec![dout, dx, workspace];
    addresses.extend(operands.weights);
    if !copies_take(problem, dtype, &addresses) {
        return Ok(None);
    }
    let launches = backward_by(problem, dtype, operands, |shapes, operands| {
        bwd_input(tile, shapes, dtype, operands, gpu)
    })?;
    Ok(Some(launches))
}

/// dx with this tile.
fn bwd_input(
    tile: &Tile,
    shapes: &Shapes<'_>,
    dtype: DType,
    operands: &InputGrad,
    gpu: &Gpu,
) -> Result<Launch> {
    type Params = ProjectionBwdInputSm90Params;
    let (rows, in_dim) = (shapes.problem.rows as u32, shapes.in_dim);
    let &InputGrad { ref parts, g, dx, .. } = operands;
    let mut maps = Maps::default();
    for (index, part) in parts.iter().enumerate().take(shapes.problem.projections.len()) {
        let columns = (rows, part.out_dim, shapes.total);
        let g = bits16(g + 2 * u64::from(part.column), columns, (tile.rows, DEPTH))?;
        maps.push(offset_of!(Params, g), index, g);
        let weight =
            bits16(part.weight, (part.out_dim, in_dim, in_dim), (DEPTH / tile.cluster, DEPTH))?;
        maps.push(offset_of!(Params, weight), index, weight);
    }
    maps.push(offset_of!(Params, dx), 0, bits16(dx, (rows, in_dim, in_dim), PIECE)?);
    let tiles = tile.count(rows.into(), &[in_dim]);
    let mut params = Params {
        problem: shapes.bwd_input_params(operands),
        tiles,
        ..bytemuck::Zeroable::zeroed()
    };
    params.problem.column_tiles = tile.columns(&[in_dim]) as u32;
    let kernel = Persistent { pass: Pass::BackwardInput, tile, tiles, gpu };
    let launch = kernel.launch(dtype, &params, maps)?;
    // dS's kernel begins when g is there, so this one may begin with g.
    let begins_early = gpu.early_launch && shapes.adapted().next().is_some();
    Ok(Launch { begins_early, ..launch })
}

#[cfg(test)]
mod tests {
    use super::*;
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
        let five = Gpu { multiprocessors: 5, ..Gpu::H100 };
        let backward = |tile, operands: &BackwardOperands<'_>| {
            backward_with(tile, &problem, DType::BF16, operands, &five)
        };
        for tile in Pass::BackwardInput.tiles() {
            let launches = backward(tile, &operands)?.unwrap();
            let [before, dx] = &launches[..] else { panic!("{}", launches.len()) };
            assert_eq!(before.kernel, "low_rank_grad_64x16_bf16");
            assert_eq!(dx.kernel, format!("projection_bwd_input_sm90_{}_bf16", tile.name));
            // Each block of a cluster of two loads half of the weights' depth.
            let (cluster, grid, depth) = if tile.cluster == 2 { (2, 4, 32) } else { (1, 5, 64) };
            assert_eq!((dx.cluster, dx.grid), (cluster, [grid, 1, 1]));
            let [g, weight] = [0, 1].map(|map| dx.tensor_maps[map].1.tile());
            assert_eq!((g, weight), (&[64, 128][..], &[64, depth][..]));
            assert_eq!(dx.tensor_maps.len(), 2 + 2 + 1);
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
        // Without dx, dS has its kernel all the same.
        let alone = BackwardOperands { dx: 0, dsmall: 1 << 20, ..operands };
        let launches = backward(&Pass::BackwardInput.tiles()[0], &alone)?.unwrap();
        assert_eq!(launches[0].kernel, "low_rank_grad_64x16_bf16");
        Ok(())
    }
}
