//! The forward of attention on Hopper, `kernels/sm90/rel_pos_attention_fwd_sm90.cuh`: for whole grids, and windows that
//! fill one. What it does not cover is the portable kernels'.
//!
//! | window | key tile | queries of a block | why |
//! |---|---|---|---|
//! | as wide as a multiple of 64, or a little less | 2 x 64 | 2 x 64 | one rel_w fragment for all tiles; SAM's grid of 64 |
//! | of 40 likewise | 4 x 40 | 3 x 40 | grids of 40 and 80, which stripes of 16 or 64 do not fill |
//! | any other | 8 x 16 | 8 x 16 | grids of 32 and 48 |

use super::bindings::{
    device_ptr, PanelMaps, RelPosAttentionFwdSm90Params, REL_POS_ATTENTION_SM90_COLS16_BOX_ROWS,
    REL_POS_ATTENTION_SM90_COLS16_HD64_SLOTS, REL_POS_ATTENTION_SM90_COLS16_HD80_SLOTS,
    REL_POS_ATTENTION_SM90_COLS16_ROWS, REL_POS_ATTENTION_SM90_COLS40_BOX_ROWS,
    REL_POS_ATTENTION_SM90_COLS40_HD64_SLOTS, REL_POS_ATTENTION_SM90_COLS40_HD80_SLOTS,
    REL_POS_ATTENTION_SM90_COLS40_ROWS, REL_POS_ATTENTION_SM90_COLS64_BOX_ROWS,
    REL_POS_ATTENTION_SM90_COLS64_HD64_SLOTS, REL_POS_ATTENTION_SM90_COLS64_HD80_SLOTS,
    REL_POS_ATTENTION_SM90_COLS64_ROWS, REL_POS_ATTENTION_SM90_QUERIES,
    REL_POS_ATTENTION_SM90_TABLE_ROWS, REL_POS_ATTENTION_SM90_THREADS,
};
use super::rel_pos_attention::{shape, Inputs};
use super::tensor_map::{Element, Swizzle, TensorMap};
use super::{tiles, AttentionProblem, Launch};
use candle_core::{DType, Result};
use std::mem::offset_of;

const FAMILY: &str = tiles::ATTENTION[2];
/// Shared memory that a block may have on Hopper.
const SHARED_BYTES: usize = 227 << 10;
/// Channels of the first part of a panel; a head of 80 has a second one.
const WIDE: usize = 64;
/// What a swizzled tile is aligned to.
const ATOM: usize = 1024;

/// A key tile of whole rows of `cols` columns.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Tile {
    cols: usize,
    /// Key rows.
    rows: usize,
    /// Grid rows that one bulk copy brings.
    box_rows: usize,
    /// Tiles that are loaded ahead.
    slots: usize,
}

/// The tile that a problem gets, if it is covered: 16 bits, heads of 64 or 80 channels, no window that hangs over the
/// grid, since a bulk copy makes zeros of what a token outside projects to.
fn tile(problem: &AttentionProblem, dtype: DType) -> Option<Tile> {
    let p = problem;
    if !matches!(dtype, DType::F16 | DType::BF16) || ![64, 80].contains(&p.head_dim) {
        return None;
    }
    let slots = |hd64: u32, hd80: u32| if p.head_dim == 64 { hd64 } else { hd80 } as usize;
    if !p.h.is_multiple_of(p.side_h) || !p.w.is_multiple_of(p.side_w) {
        return None;
    }
    if tiles::known(FAMILY, dtype, [p.head_dim, p.side_w], 0) == Some(tiles::PORTABLE) {
        return None;
    }
    let cols = tiles::attention(FAMILY, dtype, p.head_dim, p.side_w);
    let (rows, box_rows, slots) = match cols {
        64 => (
            REL_POS_ATTENTION_SM90_COLS64_ROWS,
            REL_POS_ATTENTION_SM90_COLS64_BOX_ROWS,
            slots(
                REL_POS_ATTENTION_SM90_COLS64_HD64_SLOTS,
                REL_POS_ATTENTION_SM90_COLS64_HD80_SLOTS,
            ),
        ),
        40 => (
            REL_POS_ATTENTION_SM90_COLS40_ROWS,
            REL_POS_ATTENTION_SM90_COLS40_BOX_ROWS,
            slots(
                REL_POS_ATTENTION_SM90_COLS40_HD64_SLOTS,
                REL_POS_ATTENTION_SM90_COLS40_HD80_SLOTS,
            ),
        ),
        _ => (
            REL_POS_ATTENTION_SM90_COLS16_ROWS,
            REL_POS_ATTENTION_SM90_COLS16_BOX_ROWS,
            slots(
                REL_POS_ATTENTION_SM90_COLS16_HD64_SLOTS,
                REL_POS_ATTENTION_SM90_COLS16_HD80_SLOTS,
            ),
        ),
    };
    Some(Tile { cols, rows: rows as usize, box_rows: box_rows as usize, slots })
}

/// A panel's maps, at their place `at` in the params, of a dense tensor of `dims`, innermost first: of the first channels
/// of a head and, if it has more, of the others. `tile` is that of the other dimensions.
pub(super) fn panel_maps(
    head_dim: usize,
    address: device_ptr,
    dims: &[usize],
    tile: &[usize],
    at: usize,
) -> Result<Vec<(usize, TensorMap)>> {
    let element = Element::Bits16;
    let mut stride = u64::from(element.bytes());
    let mut strides = Vec::new();
    for size in &dims[..dims.len() - 1] {
        stride *= *size as u64;
        strides.push(stride);
    }
    let map = |channels: usize, swizzle| {
        let dims = dims.iter().map(|&n| n as u32).collect();
        let tile = [channels].iter().chain(tile).map(|&n| n as u32).collect();
        let map = TensorMap { address, element, dims, strides: strides.clone(), tile, swizzle };
        map.check().map(|()| map)
    };
    let mut maps = vec![(at + offset_of!(PanelMaps, wide), map(WIDE, Swizzle::Bytes128)?)];
    if head_dim > WIDE {
        maps.push((at + offset_of!(PanelMaps, tail), map(head_dim - WIDE, Swizzle::Bytes32)?));
    }
    Ok(maps)
}

/// Of qkv as grids, in tiles of so many columns and rows.
pub(super) fn grid_maps(
    p: &AttentionProblem,
    qkv: device_ptr,
    tile: [usize; 2],
    at: usize,
) -> Result<Vec<(usize, TensorMap)>> {
    let [cols, rows] = tile;
    let dims = [3 * p.channels(), p.w, p.h, p.batch];
    panel_maps(p.head_dim, qkv, &dims, &[cols, rows, 1], at)
}

/// Of both tables, as one list of rows.
pub(super) fn table_maps(
    p: &AttentionProblem,
    tables: device_ptr,
    at: usize,
) -> Result<Vec<(usize, TensorMap)>> {
    let (h, w) = p.table_rows();
    let rows = REL_POS_ATTENTION_SM90_TABLE_ROWS as usize;
    panel_maps(p.head_dim, tables, &[p.head_dim, h + w], &[rows], at)
}

impl Tile {
    /// As `Storage` of the kernel lays it out, and behind it `Biases`.
    fn shared_bytes(&self, problem: &AttentionProblem) -> usize {
        let panel = |rows: usize| (rows * problem.head_dim * 2).next_multiple_of(ATOM);
        let keys = panel(self.rows * self.cols);
        let queries = REL_POS_ATTENTION_SM90_QUERIES as usize;
        let storage = panel(queries) + self.slots * keys + (1 + 2 * self.slots) * 8;
        let stride_h = problem.side_h.next_multiple_of(self.rows) | 1;
        let stride_w = problem.side_w.next_multiple_of(self.cols) + 8;
        storage.next_multiple_of(ATOM) + 4 * queries * (stride_h + stride_w)
    }

    fn maps(&self, p: &AttentionProblem, inputs: &Inputs) -> Result<Vec<(usize, TensorMap)>> {
        type Params = RelPosAttentionFwdSm90Params;
        let at = offset_of!(Params, qkv_maps);
        let mut maps = grid_maps(p, inputs.qkv, [self.cols, self.box_rows], at)?;
        if inputs.tables != 0 {
            maps.extend(table_maps(p, inputs.tables, offset_of!(Params, table_maps))?);
        }
        Ok(maps)
    }

    /// Blocks of a window's head.
    fn blocks(&self, problem: &AttentionProblem) -> usize {
        let rows = REL_POS_ATTENTION_SM90_QUERIES as usize / self.cols;
        problem.side_h.div_ceil(rows) * problem.side_w.div_ceil(self.cols)
    }
}

/// What [`super::rel_pos_attention::forward`] launches, for Hopper; none where its kernels do not cover the problem.
///
/// # Errors
/// On shapes that no grid covers.
pub fn forward(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    out: device_ptr,
    lse: device_ptr,
) -> Result<Option<Launch>> {
    let Some(tile) = tile(problem, dtype) else { return Ok(None) };
    let &Inputs { qkv, tables, pad } = inputs;
    let aligned = [qkv, tables, pad, out].iter().all(|address| address.is_multiple_of(16));
    let shared_bytes = tile.shared_bytes(problem);
    if !aligned || shared_bytes > SHARED_BYTES {
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
    let launch = Launch::new(&family, dtype, grid, REL_POS_ATTENTION_SM90_THREADS, &params)?;
    let (shared_bytes, tensor_maps) = (shared_bytes as u32, tile.maps(problem, inputs)?);
    Ok(Some(Launch { shared_bytes, tensor_maps, ..launch }))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SAM's ViT-B.
    const GLOBAL: AttentionProblem = AttentionProblem {
        batch: 4,
        h: 64,
        w: 64,
        num_heads: 12,
        head_dim: 64,
        side_h: 64,
        side_w: 64,
        softmax_scale: 0.125,
        rel_pos: true,
        dropout: None,
    };
    const INPUTS: Inputs = Inputs { qkv: 64, tables: 128, pad: 192 };

    fn launch(problem: AttentionProblem) -> Result<Option<Launch>> {
        forward(&problem, DType::BF16, &INPUTS, 16, 4)
    }

    #[test]
    fn a_grid_streams_through_its_blocks() -> Result<()> {
        let global = launch(GLOBAL)?.unwrap();
        assert_eq!(global.kernel, "rel_pos_attention_fwd_sm90_hd64_cols64_bf16");
        // Two grid rows a block; q, six slots of 128 keys, barriers, and 65 + 72 biases of 128 queries.
        assert_eq!((global.grid, global.block), ([4 * 12 * 32, 1, 1], [384, 1, 1]));
        assert_eq!(global.shared_bytes, (7 << 14) + 1024 + 128 * (65 + 72) * 4);
        Ok(())
    }

    #[test]
    fn tensor_maps_stand_where_the_kernel_reads_them() -> Result<()> {
        let maps = launch(AttentionProblem { head_dim: 80, ..GLOBAL })?.unwrap().tensor_maps;
        let found: Vec<_> = maps.iter().map(|(at, map)| (*at, map.tile.clone())).collect();
        let tokens = |channels| vec![channels, 64, 2, 1];
        let expected =
            [(0, tokens(64)), (128, tokens(16)), (256, vec![64, 64]), (384, vec![16, 64])];
        assert_eq!(found, expected);
        assert_eq!(maps[0].1.strides, [5760, 64 * 5760, 4096 * 5760]);
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
        assert!(forward(&GLOBAL, DType::F32, &INPUTS, 16, 4)?.is_none());
        let unaligned = Inputs { qkv: 72, ..INPUTS };
        assert!(forward(&GLOBAL, DType::BF16, &unaligned, 16, 4)?.is_none());
        Ok(())
    }
}
