//! The forward of attention on Hopper, `kernels/rel_pos_attention/sm90/fwd.cuh`: for whole grids, and windows that
//! fill one. The portable kernels serve the other problems.

use crate::launch::bindings::{
    device_ptr, PanelMaps, RelPosAttentionFwdSm90Params, REL_POS_ATTENTION_SM90_TABLE_ROWS,
};
use crate::launch::rel_pos_attention::portable::{shape, Inputs};
use crate::launch::rel_pos_attention::sm90::tiles::{self, StreamTile, Tiles};
use crate::launch::tensor_map::{Element, Swizzle, TensorMap, LONGEST};
use crate::launch::{narrow, AttentionProblem, Gpu, Launch};
use candle_core::{DType, Result};
use std::mem::offset_of;

const FAMILY: &str = "rel_pos_attention_fwd_sm90";
/// Channels of the first part of a panel; a head of 80 has a second one.
const WIDE: usize = 64;

/// 16 bits, and addresses and sizes as bulk copies want them.
pub(in crate::launch) fn covers(
    p: &AttentionProblem,
    dtype: DType,
    addresses: &[device_ptr],
) -> bool {
    matches!(dtype, DType::F16 | DType::BF16)
        && addresses.iter().all(|address| address.is_multiple_of(16))
        && [p.batch, p.tokens(), 3 * p.channels()].iter().all(|size| *size <= LONGEST)
}

/// Tensor maps and where they stand in the params.
pub(in crate::launch) type Maps = Vec<(usize, TensorMap)>;

/// Tensor maps of a panel, at place `at` in the params, over a dense tensor of `dims`, innermost first. One map is for
/// the first channels of a head, and another for the rest, if any. `tile` is that of the other dimensions.
pub(in crate::launch) fn panel_maps(
    head_dim: usize,
    address: device_ptr,
    dims: &[usize],
    tile: &[usize],
    at: usize,
) -> Result<Maps> {
    let element = Element::Bits16;
    let mut stride = u64::from(element.bytes());
    let mut strides = Vec::new();
    for size in &dims[..dims.len() - 1] {
        stride *= *size as u64;
        strides.push(stride);
    }
    let size = |&size: &usize| narrow("rel-pos-attention", "a dimension", size);
    let dims = dims.iter().map(size).collect::<Result<Vec<_>>>()?;
    let map = |channels: usize, swizzle| {
        let tile: Vec<_> = [channels].iter().chain(tile).map(|&n| n as u32).collect();
        TensorMap::new((address, element), &dims, &strides, &tile, swizzle)
    };
    let mut maps = vec![(at + offset_of!(PanelMaps, wide), map(WIDE, Swizzle::Bytes128)?)];
    if head_dim > WIDE {
        maps.push((at + offset_of!(PanelMaps, tail), map(head_dim - WIDE, Swizzle::Bytes32)?));
    }
    Ok(maps)
}

/// Tensor maps of a grid's tokens, `channels` each, in tiles of `[columns, rows]`.
pub(in crate::launch) fn grid_maps(
    p: &AttentionProblem,
    address: device_ptr,
    channels: usize,
    tile: [usize; 2],
    at: usize,
) -> Result<Maps> {
    let [cols, rows] = tile;
    panel_maps(p.head_dim, address, &[channels, p.w, p.h, p.batch], &[cols, rows, 1], at)
}

/// Tensor maps of both tables, if there are any.
pub(in crate::launch) fn table_maps(
    p: &AttentionProblem,
    tables: [device_ptr; 2],
    at: usize,
) -> Result<Maps> {
    let (h, w) = p.table_rows();
    let box_rows = [REL_POS_ATTENTION_SM90_TABLE_ROWS as usize];
    let mut maps = Maps::new();
    for (index, (table, rows)) in tables.into_iter().zip([h, w]).enumerate() {
        if table != 0 {
            let at = at + index * size_of::<PanelMaps>();
            maps.extend(panel_maps(p.head_dim, table, &[p.head_dim, rows], &box_rows, at)?);
        }
    }
    Ok(maps)
}

impl StreamTile {
    /// Tensor maps of qkv or the output's gradient as grids, with `channels` a token.
    pub(in crate::launch) fn grid_maps(
        &self,
        p: &AttentionProblem,
        address: device_ptr,
        channels: usize,
        at: usize,
    ) -> Result<Maps> {
        grid_maps(p, address, channels, [self.cols, self.box_rows], at)
    }

    /// Blocks of a window's head.
    pub fn blocks(&self, problem: &AttentionProblem) -> usize {
        let rows = self.queries / self.cols;
        problem.side_h.div_ceil(rows) * problem.side_w.div_ceil(self.cols)
    }
}

/// Hopper launches of [`crate::launch::rel_pos_attention::forward`]; none where the kernels do not cover the problem.
///
/// # Errors
/// On shapes that no grid covers.
pub fn forward(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    [out, lse]: [device_ptr; 2],
    gpu: &Gpu,
) -> Result<Option<Launch>> {
    let Some(Tiles { forward: tile, .. }) = tiles::pick(problem, gpu.forced.attention_cols) else {
        return Ok(None);
    };
    let &Inputs { qkv, tables, pad } = inputs;
    // A bulk copy makes zeros of tokens outside the grid, so no window may hang over it.
    let whole =
        problem.h.is_multiple_of(problem.side_h) && problem.w.is_multiple_of(problem.side_w);
    if !whole || !covers(problem, dtype, &[qkv, tables[0], tables[1], pad, out]) {
        return Ok(None);
    }
    let params = RelPosAttentionFwdSm90Params {
        tables,
        pad,
        out,
        lse,
        shape: shape(problem),
        ..bytemuck::Zeroable::zeroed()
    };
    let family = format!("{FAMILY}_hd{}_cols{}", problem.head_dim, tile.cols);
    let units = problem.windows() * problem.num_heads;
    let grid = [units as u64 * tile.blocks(problem) as u64, 1, 1];
    let launch = Launch::new(&family, dtype, grid, tile.threads, &params)?;
    let at = offset_of!(RelPosAttentionFwdSm90Params, qkv_maps);
    let mut tensor_maps = tile.grid_maps(problem, qkv, 3 * problem.channels(), at)?;
    let at = offset_of!(RelPosAttentionFwdSm90Params, table_maps);
    tensor_maps.extend(table_maps(problem, tables, at)?);
    let shared_bytes = tile.forward_bytes(problem) as u32;
    Ok(Some(Launch { shared_bytes, tensor_maps, ..launch }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::rel_pos_attention::portable::tests::GLOBAL;

    const INPUTS: Inputs = Inputs { qkv: 64, tables: [128, 256], pad: 192 };

    fn launch(problem: AttentionProblem) -> Result<Option<Launch>> {
        forward(&problem, DType::BF16, &INPUTS, [16, 4], &Gpu::H100)
    }

    #[test]
    fn a_grid_streams_through_its_blocks() -> Result<()> {
        let global = launch(GLOBAL)?.unwrap();
        assert_eq!(global.kernel, "rel_pos_attention_fwd_sm90_hd64_cols64_bf16");
        // Three grid rows a block; q, six slots of 64 keys, barriers, and 65 + 72 biases of 192 queries.
        assert_eq!((global.grid, global.block), ([4 * 12 * 22, 1, 1], [512, 1, 1]));
        assert_eq!(global.shared_bytes, (9 << 13) + 1024 + 192 * (65 + 72) * 4);
        // Two of 16 columns, where the biases of 192 queries do not fit.
        let tall = launch(AttentionProblem { h: 140, side_h: 140, ..GLOBAL })?.unwrap();
        assert_eq!(tall.kernel, "rel_pos_attention_fwd_sm90_hd64_cols16_bf16");
        assert_eq!((tall.grid, tall.block), ([4 * 12 * 4 * 18, 1, 1], [384, 1, 1]));
        Ok(())
    }

    #[test]
    fn tensor_maps_stand_where_the_kernel_reads_them() -> Result<()> {
        let maps = launch(AttentionProblem { head_dim: 80, ..GLOBAL })?.unwrap().tensor_maps;
        let found: Vec<_> = maps.iter().map(|(at, map)| (*at, map.tile().to_vec())).collect();
        let tokens = |channels| vec![channels, 64, 1, 1];
        let table = |at| [(at, vec![64, 64]), (at + 128, vec![16, 64])];
        let expected =
            [vec![(0, tokens(64)), (128, tokens(16))], table(256).into(), table(512).into()];
        assert_eq!(found, expected.concat());
        let tables: Vec<_> = maps[2..].iter().map(|(_, map)| map.address).collect();
        assert_eq!(tables, INPUTS.tables.map(|at| [at; 2]).concat());
        assert_eq!(maps[0].1.strides(), [5760, 64 * 5760, 4096 * 5760]);
        Ok(())
    }

    #[test]
    fn the_rest_is_the_portable_kernels() -> Result<()> {
        let covered = |problem| Ok::<_, candle_core::Error>(launch(problem)?.is_some());
        assert!(covered(AttentionProblem { side_h: 32, side_w: 32, ..GLOBAL })?);
        // Windows that hang over the grid; other heads; biases that do not fit.
        assert!(!covered(AttentionProblem { side_h: 14, side_w: 14, ..GLOBAL })?);
        assert!(!covered(AttentionProblem { head_dim: 32, ..GLOBAL })?);
        assert!(!covered(AttentionProblem { h: 256, w: 256, side_h: 256, side_w: 256, ..GLOBAL })?);
        assert!(forward(&GLOBAL, DType::F32, &INPUTS, [16, 4], &Gpu::H100)?.is_none());
        let unaligned = Inputs { qkv: 72, ..INPUTS };
        assert!(forward(&GLOBAL, DType::BF16, &unaligned, [16, 4], &Gpu::H100)?.is_none());
        // More images than a coordinate counts.
        let images = |batch| AttentionProblem { batch, h: 1, w: 1, side_h: 1, side_w: 1, ..GLOBAL };
        assert!(covered(AttentionProblem { num_heads: 1, ..images((1 << 31) - 1) })?);
        assert!(!covered(AttentionProblem { num_heads: 1, ..images(1 << 31) })?);
        Ok(())
    }
}
