//! The backward of attention on Hopper, for whole grids: `kernels/rel_pos_attention/sm90/bwd_query.cuh`, then
//! `rel_pos_attention/sm90/bwd_key.cuh`. The portable kernels serve the other problems.

use crate::launch::bindings::{
    RelPosAttentionBwdKeySm90Params, RelPosAttentionBwdQuerySm90Params,
    REL_POS_ATTENTION_SM90_BWD_KEYS, REL_POS_ATTENTION_SM90_BWD_KEY_QUERIES,
    REL_POS_ATTENTION_SM90_BWD_KEY_THREADS,
};
use crate::launch::rel_pos_attention::portable::{self, BackwardOperands, BetweenPasses, Inputs};
use crate::launch::rel_pos_attention::sm90::forward::{
    covers, grid_maps, panel_maps, table_maps, Maps,
};
use crate::launch::rel_pos_attention::sm90::tile::SHARED_BYTES;
use crate::launch::rel_pos_attention::sm90::tiles::{self, KeyBlock, StreamTile};
use crate::launch::tensor_map::{Element, Swizzle, TensorMap, LONGEST};
use crate::launch::{narrow, AttentionProblem, Gpu, Launch};
use bytemuck::Zeroable;
use candle_core::{DType, Result};
use std::mem::offset_of;

const BY_QUERY: &str = "rel_pos_attention_bwd_query_sm90";
const BY_KEY: &str = "rel_pos_attention_bwd_key_sm90";

/// Hopper launches of [`portable::backward`], with the same workspace; none where the kernels do not cover the problem.
///
/// # Errors
/// As the portable one.
pub fn backward(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    operands: &BackwardOperands,
    gpu: &Gpu,
) -> Result<Option<Vec<Launch>>> {
    let p = problem;
    let Some(tiles) = tiles::pick(p, gpu.forced.attention_cols) else { return Ok(None) };
    let &BackwardOperands { out, dout, dqkv, dtables, dpad, workspace, .. } = operands;
    let whole = p.side_h == p.h && p.side_w == p.w && dpad == 0;
    let [rel_pos_h, rel_pos_w] = inputs.tables;
    let addresses = [inputs.qkv, rel_pos_h, rel_pos_w, out, dout, dqkv, workspace];
    let tile = tiles.query;
    let fits = query_shared_bytes(p, tile) <= SHARED_BYTES;
    // The key pass copies rows of all heads and windows.
    let counted = portable::rows(p) <= LONGEST;
    if !whole || !fits || !counted || !covers(p, dtype, &addresses) {
        return Ok(None);
    }
    let between = BetweenPasses::new(p, dtype, operands, gpu)?;
    let items = (p.windows() * p.num_heads * tile.blocks(p)) as u64;
    let blocks = match dtables {
        0 => items,
        _ => items.min(between.table_parts).min(gpu.persistent_blocks()),
    };
    let passes = Passes { p, dtype, inputs, operands, between: &between };
    let mut launches = vec![passes.by_query(tile, items, blocks)?, passes.by_key(tiles.key)?];
    if dtables != 0 {
        launches.push(between.sum_tables(p, dtype, blocks, dtables)?);
    }
    Ok(Some(launches))
}

/// With the biases, and the gradients of rel_h if there are several stripes.
fn query_shared_bytes(p: &AttentionProblem, tile: &StreamTile) -> usize {
    let [h, w] = tile.bias_strides(p);
    let gradients = if p.side_w <= tile.cols { 0 } else { h };
    tile.bytes + 4 * tile.queries * (h + w + gradients)
}

/// A backward whose operands the two passes share.
struct Passes<'a> {
    p: &'a AttentionProblem,
    dtype: DType,
    inputs: &'a Inputs,
    operands: &'a BackwardOperands,
    between: &'a BetweenPasses,
}

impl Passes<'_> {
    /// So many blocks take turns at the items: blocks of queries.
    fn by_query(&self, tile: &StreamTile, items: u64, blocks: u64) -> Result<Launch> {
        type Params = RelPosAttentionBwdQuerySm90Params;
        let &Self { p, dtype, inputs, operands, between } = self;
        let &Inputs { qkv, tables, .. } = inputs;
        let &BackwardOperands { out, lse, dout, dqkv, .. } = operands;
        let &BetweenPasses { bias, delta, table_partials, .. } = between;
        let channels = p.channels();
        let mut maps = tile.grid_maps(p, qkv, 3 * channels, offset_of!(Params, qkv_maps))?;
        maps.extend(tile.grid_maps(p, dout, channels, offset_of!(Params, dout_maps))?);
        maps.extend(table_maps(p, tables, offset_of!(Params, table_maps))?);
        let params = Params {
            tables,
            out,
            lse,
            dout,
            dqkv,
            bias,
            delta,
            table_partials,
            items,
            shape: portable::shape(p),
            ..Params::zeroed()
        };
        let family = format!("{BY_QUERY}_hd{}_cols{}", p.head_dim, tile.cols);
        let launch = Launch::new(&family, dtype, [blocks, 1, 1], tile.threads, &params)?;
        let shared_bytes = query_shared_bytes(p, tile) as u32;
        Ok(Launch { shared_bytes, tensor_maps: maps, ..launch })
    }

    fn by_key(&self, block: &KeyBlock) -> Result<Launch> {
        type Params = RelPosAttentionBwdKeySm90Params;
        let &Self { p, dtype, inputs: &Inputs { qkv, .. }, operands, between } = self;
        let queries = REL_POS_ATTENTION_SM90_BWD_KEY_QUERIES as usize;
        let &KeyBlock { cols, bytes, .. } = block;
        let rows = REL_POS_ATTENTION_SM90_BWD_KEYS as usize / cols;
        // As the kernel's stages lay the biases of a query out.
        let (stride_w, stride_h) = (cols + 4, rows.next_multiple_of(4));

        let channels = p.channels();
        let mut maps = grid_maps(p, qkv, 3 * channels, [cols, rows], offset_of!(Params, key_maps))?;
        let list = |address, channels, at| {
            panel_maps(p.head_dim, address, &[channels, p.tokens(), p.batch], &[queries, 1], at)
        };
        maps.extend(list(qkv, 3 * channels, offset_of!(Params, query_maps))?);
        maps.extend(list(operands.dout, channels, offset_of!(Params, dout_maps))?);
        maps.extend(bias_maps(p, between, queries, [stride_w, stride_h])?);

        let shape = portable::shape(p);
        let params = Params { dqkv: operands.dqkv, shape, ..Params::zeroed() };
        let family = format!("{BY_KEY}_hd{}_cols{cols}", p.head_dim);
        let units = p.windows() * p.num_heads;
        let grid = [(units * p.side_h.div_ceil(rows) * p.side_w.div_ceil(cols)) as u64, 1, 1];
        let launch =
            Launch::new(&family, dtype, grid, REL_POS_ATTENTION_SM90_BWD_KEY_THREADS, &params)?;
        Ok(Launch { shared_bytes: bytes as u32, tensor_maps: maps, ..launch })
    }
}

/// Tensor maps of the query pass's results, for tiles of `queries`: columns of rel_w and of rel_h, and delta.
fn bias_maps(
    p: &AttentionProblem,
    between: &BetweenPasses,
    queries: usize,
    [stride_w, stride_h]: [usize; 2],
) -> Result<Maps> {
    type Params = RelPosAttentionBwdKeySm90Params;
    let rows = narrow("rel-pos-attention", "heads times tokens", portable::rows(p))?;
    let pitch = portable::bias_pitch(p) as u32;
    let queries = queries as u32;
    let biases = |columns: usize| {
        let (shape, tile) = ((rows, pitch, pitch), (queries, columns as u32));
        TensorMap::unswizzled(between.bias, Element::Bits32, shape, tile)
    };
    let delta = (between.delta, Element::Bits32);
    let delta = TensorMap::new(delta, &[rows], &[], &[queries], Swizzle::None)?;
    Ok(vec![
        (offset_of!(Params, rel_w_map), biases(stride_w)?),
        (offset_of!(Params, rel_h_map), biases(stride_h)?),
        (offset_of!(Params, delta_map), delta),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::rel_pos_attention::portable::tests::GLOBAL;

    const INPUTS: Inputs = Inputs { qkv: 64, tables: [128, 256], pad: 0 };
    const OPERANDS: BackwardOperands = BackwardOperands {
        out: 16,
        lse: 4,
        dout: 32,
        dqkv: 48,
        dtables: 0,
        dpad: 0,
        workspace: 1 << 20,
    };

    fn run(problem: &AttentionProblem, operands: &BackwardOperands) -> Result<Option<Vec<Launch>>> {
        backward(problem, DType::BF16, &INPUTS, operands, &Gpu::H100)
    }

    #[test]
    fn a_block_of_queries_goes_through_all_keys() -> Result<()> {
        let launches = run(&GLOBAL, &OPERANDS)?.unwrap();
        let query = &launches[0];
        assert_eq!(query.kernel, "rel_pos_attention_bwd_query_sm90_hd64_cols64_bf16");
        assert_eq!((query.grid, query.block), ([4 * 12 * 32, 1, 1], [384, 1, 1]));
        // q, dout, eight slots of 64 keys, two lots of barriers, and 65 + 72 biases of 128 queries.
        let bytes = (2 << 14) + (8 << 13) + 2 * 1024 + 128 * (65 + 72) * 4;
        assert_eq!((query.shared_bytes, launches.len()), (bytes, 2));
        // With the tables' gradients, as many blocks as there are partial sums.
        let trained = BackwardOperands { dtables: 256, ..OPERANDS };
        let launches = run(&GLOBAL, &trained)?.unwrap();
        assert_eq!((launches[0].grid, launches.len()), ([132, 1, 1], 3));
        let small = AttentionProblem { h: 8, w: 17, side_h: 8, side_w: 17, ..GLOBAL };
        let parts = run(&small, &trained)?.unwrap()[0].grid[0];
        let room = BetweenPasses::new(&small, DType::BF16, &trained, &Gpu::H100)?.table_parts;
        assert!(u64::from(parts) <= room);
        Ok(())
    }

    #[test]
    fn a_block_of_keys_goes_through_all_queries() -> Result<()> {
        let launches = run(&GLOBAL, &OPERANDS)?.unwrap();
        let key = &launches[1];
        assert_eq!(key.kernel, "rel_pos_attention_bwd_key_sm90_hd64_cols64_bf16");
        // Two grid rows of keys a block.
        assert_eq!((key.grid, key.block), ([4 * 12 * 32, 1, 1], [384, 1, 1]));
        let stage = 2 * 64 * 64 * 2 + (64 * (68 + 4 + 1) * 4usize).next_multiple_of(1024);
        assert_eq!(key.shared_bytes as usize, 4 * stage + 2 * 128 * 64 * 2 + 1024);
        let tiles: Vec<_> = key.tensor_maps.iter().map(|(_, map)| map.tile().to_vec()).collect();
        let expected: [&[u32]; 6] =
            [&[64, 64, 2, 1], &[64, 64, 1], &[64, 64, 1], &[68, 64], &[4, 64], &[64]];
        assert_eq!(tiles, expected);
        Ok(())
    }

    #[test]
    fn the_rest_is_the_portable_kernels() -> Result<()> {
        let covered = |problem| run(&problem, &OPERANDS).map(|launches| launches.is_some());
        assert!(covered(AttentionProblem { h: 33, w: 7, side_h: 33, side_w: 7, ..GLOBAL })?);
        // Windows; other heads; biases that do not fit.
        assert!(!covered(AttentionProblem { side_h: 14, side_w: 14, ..GLOBAL })?);
        assert!(!covered(AttentionProblem { head_dim: 32, ..GLOBAL })?);
        assert!(!covered(AttentionProblem { h: 96, w: 96, side_h: 96, side_w: 96, ..GLOBAL })?);
        assert!(backward(&GLOBAL, DType::F32, &INPUTS, &OPERANDS, &Gpu::H100)?.is_none());
        let unaligned = BackwardOperands { dqkv: 40, ..OPERANDS };
        assert!(run(&GLOBAL, &unaligned)?.is_none());
        Ok(())
    }

    #[test]
    fn rows_beyond_a_coordinate_are_the_portable_kernels() -> Result<()> {
        // Heads times tokens: 2^31 - 1 is a prime, so of one token each.
        let images = AttentionProblem { num_heads: 1, h: 1, w: 1, side_h: 1, side_w: 1, ..GLOBAL };
        let last = AttentionProblem { batch: (1 << 31) - 1, ..images };
        let sam = AttentionProblem { batch: 43691, ..GLOBAL };
        for (problem, hopper) in [
            (last, true),
            (AttentionProblem { batch: 1 << 31, ..images }, false),
            (AttentionProblem { batch: 43690, ..GLOBAL }, true),
            (sam, false),
        ] {
            let launches = run(&problem, &OPERANDS)?;
            assert_eq!(launches.is_some(), hopper, "{problem:?}");
        }
        assert!(portable::rows(&sam) > 1 << 31);
        let launches = portable::backward(&sam, DType::BF16, &INPUTS, &OPERANDS, &Gpu::H100)?;
        assert_eq!(launches.len(), 2);
        Ok(())
    }
}
