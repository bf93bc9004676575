//! Attention with relative positions: `kernels/rel_pos_attention/fwd.cuh`, and the two passes of its backward.

use crate::launch::bindings::{
    device_ptr, RelPosAttentionBwdKeyParams, RelPosAttentionBwdQueryParams,
    RelPosAttentionFwdParams, RelPosAttentionShape, REL_POS_ATTENTION_COLS16_ROWS,
    REL_POS_ATTENTION_COLS16_WARPS, REL_POS_ATTENTION_COLS40_ROWS, REL_POS_ATTENTION_COLS40_WARPS,
    REL_POS_ATTENTION_COLS64_ROWS, REL_POS_ATTENTION_COLS64_WARPS, REL_POS_ATTENTION_F32_ROWS,
    REL_POS_ATTENTION_F32_WARPS, REL_POS_ATTENTION_KEY_QUERIES, REL_POS_ATTENTION_KEY_QUERIES_F32,
    REL_POS_ATTENTION_KEY_SIDE, REL_POS_ATTENTION_KEY_WARPS, REL_POS_ATTENTION_ROW_PAD,
};
use crate::launch::{dropout, sum_partials, tiles, AttentionProblem, Gpu, Launch};
use candle_core::{bail, DType, Result};

const OP: &str = AttentionProblem::OP;
const FORWARD: &str = tiles::ATTENTION[0];
const BY_QUERY: &str = tiles::ATTENTION[1];
/// Shared memory that a block may have on an A100; the kernels' demand grows with the sides of the window.
const SHARED_BYTES: usize = 163 << 10;
/// Key tiles of the backward's key pass are squares, the biases' rows are padded to whole ones.
const KEY_SIDE: usize = REL_POS_ATTENTION_KEY_SIDE as usize;

/// A key tile: `rows` key rows by `cols` columns, whole rows of the window or whole stretches of them, for blocks of
/// 16 queries a warp.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Channels: head_dim rounded up.
    pub dim: usize,
    /// Columns.
    pub cols: usize,
    /// Key rows.
    pub rows: usize,
    /// Warps of a block.
    pub warps: usize,
}

/// Channels that kernels are compiled for; other heads are padded in shared memory.
const DIMS: [usize; 4] = [16, 32, 64, 80];

/// Which tile the kernels of a family give a problem, if any: columns as [`tiles`] says, and
///
/// | dtype | columns | key rows | warps | why |
/// |---|---|---|---|---|
/// | f16, bf16 | 64 | 1 | 4 | one rel_h for 64 keys; a block's 64 queries are one row of SAM's 64 x 64 grid |
/// | f16, bf16 | 40 | 2 | 4 | grids of 40 and 80, which stripes of 16 or 64 do not fill |
/// | f16, bf16 | 16 | 4 | 7 | a window's row of 14 is 16; its 196 queries are two blocks of 112 |
/// | f32 | 16 | 2 | 4 | twice the bytes and registers: half the keys |
pub fn tile(family: &str, problem: &AttentionProblem, dtype: DType) -> Option<Tile> {
    let dim = *DIMS.iter().find(|&&dim| dim >= problem.head_dim)?;
    let cols = tiles::attention(family, dtype, problem.head_dim, problem.side_w);
    let (rows, warps) = match (dtype, cols) {
        (DType::F32, _) => (REL_POS_ATTENTION_F32_ROWS, REL_POS_ATTENTION_F32_WARPS),
        (DType::F16 | DType::BF16, 64) => {
            (REL_POS_ATTENTION_COLS64_ROWS, REL_POS_ATTENTION_COLS64_WARPS)
        }
        (DType::F16 | DType::BF16, 40) => {
            (REL_POS_ATTENTION_COLS40_ROWS, REL_POS_ATTENTION_COLS40_WARPS)
        }
        (DType::F16 | DType::BF16, _) => {
            (REL_POS_ATTENTION_COLS16_ROWS, REL_POS_ATTENTION_COLS16_WARPS)
        }
        _ => return None,
    };
    Some(Tile { dim, cols, rows: rows as usize, warps: warps as usize })
}

impl Tile {
    /// Queries of a block.
    pub fn queries(&self) -> usize {
        16 * self.warps
    }

    /// Two stages of keys and values.
    fn stage_bytes(&self, dtype: DType) -> usize {
        let stride = self.dim + REL_POS_ATTENTION_ROW_PAD as usize;
        4 * self.rows * self.cols * stride * dtype.size_in_bytes()
    }

    /// Floats of a query's rel_h and rel_w, as `Biases` in `kernels/rel_pos_attention/common.cuh` lays them out.
    fn bias_strides(&self, problem: &AttentionProblem) -> (usize, usize) {
        (
            problem.side_h.next_multiple_of(self.rows) | 1,
            problem.side_w.next_multiple_of(self.cols) + 8,
        )
    }

    fn forward_shared_bytes(&self, problem: &AttentionProblem, dtype: DType) -> usize {
        let (h, w) = self.bias_strides(problem);
        self.stage_bytes(dtype) + 4 * self.queries() * (h + w)
    }

    /// The same with the gradients of rel_h, which need a place of their own if there are several stripes, and in f32
    /// with q and the output's gradient.
    fn backward_shared_bytes(&self, problem: &AttentionProblem, dtype: DType) -> usize {
        let h = if problem.side_w <= self.cols { 0 } else { self.bias_strides(problem).0 };
        let rows = if dtype == DType::F32 { 2 * self.queries() } else { 0 };
        let stride = self.dim + REL_POS_ATTENTION_ROW_PAD as usize;
        self.forward_shared_bytes(problem, dtype) + 4 * (self.queries() * h + rows * stride)
    }

    fn instance(&self, family: &str) -> String {
        format!("{family}_hd{}_cols{}", self.dim, self.cols)
    }
}

pub(in crate::launch) fn shape(p: &AttentionProblem) -> RelPosAttentionShape {
    RelPosAttentionShape {
        h: p.h as u32,
        w: p.w as u32,
        side_h: p.side_h as u32,
        side_w: p.side_w as u32,
        window_rows: p.window_rows() as u32,
        window_cols: p.window_cols() as u32,
        num_heads: p.num_heads as u32,
        head_dim: p.head_dim as u32,
        softmax_scale: p.softmax_scale,
        dropout: dropout::mask(p.dropout),
    }
}

/// The tile, or why the kernels do not cover the problem.
///
/// # Errors
/// On other dtypes than f32, f16 and bf16, heads of more than 80 channels or, in 16 bits, an odd number of them, grids
/// whose biases do not fit into shared memory, addresses that are not multiples of 4.
pub fn check(
    family: &str,
    problem: &AttentionProblem,
    dtype: DType,
    addresses: &[device_ptr],
) -> Result<Tile> {
    let Some(tile) = tile(family, problem, dtype) else {
        bail!(
            "{OP}: kernels are for f32, f16 and bf16 and head_dim up to 80, got {dtype:?} and {}",
            problem.head_dim
        )
    };
    let aligned = (problem.head_dim * dtype.size_in_bytes()).is_multiple_of(4);
    if !aligned || addresses.iter().any(|a| !a.is_multiple_of(4)) {
        bail!(
            "{OP}: a head of {} {dtype:?} must start and end at multiples of 4 bytes",
            problem.head_dim
        )
    }
    let bytes = tile.backward_shared_bytes(problem, dtype);
    if bytes > SHARED_BYTES {
        bail!("{OP}: windows of {} x {} tokens need {bytes} bytes of shared memory a block, over {SHARED_BYTES}", problem.side_h, problem.side_w)
    }
    Ok(tile)
}

/// Shared memory that the largest of a problem's blocks takes, forward and backward, if the kernels cover it; some
/// devices have less than the A100's.
pub fn shared_bytes(problem: &AttentionProblem, dtype: DType) -> Option<usize> {
    let mut most = 0;
    for family in [FORWARD, BY_QUERY] {
        let tile = check(family, problem, dtype, &[]).ok()?;
        let bytes = tile.backward_shared_bytes(problem, dtype);
        most = most.max(bytes).max(key_shared_bytes(tile.dim, dtype));
    }
    Some(most)
}

/// The addresses of the inputs, all of one dtype; 0 where absent.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[batch, h, w, 3, heads, head_dim]`
    pub qkv: device_ptr,
    /// rel_pos_h `[2 side_h - 1, head_dim]` and rel_pos_w `[2 side_w - 1, head_dim]`; 0 without relative positions.
    pub tables: [device_ptr; 2],
    /// What a token outside the grid projects to, `[3, heads, head_dim]`; 0 for zeros.
    pub pad: device_ptr,
}

/// Heads of all windows times their tokens; of a window's, those on the grid come first, in order.
pub(in crate::launch) fn rows(problem: &AttentionProblem) -> usize {
    problem.windows() * problem.num_heads * problem.tokens()
}

/// Elements of `lse`, f32: `[windows, heads, tokens]`. With f32 operands `[windows, heads, tokens, 2]`, the maximum in base 2
/// and the sum.
pub fn lse_elements(problem: &AttentionProblem, dtype: DType) -> usize {
    rows(problem) * if dtype == DType::F32 { 2 } else { 1 }
}

/// Numbers that the passes of the backward share of a query: delta; in f32 with the maximum, the inverse of the sum, and a
/// place not used.
fn statistics(dtype: DType) -> usize {
    if dtype == DType::F32 {
        4
    } else {
        1
    }
}

/// `out [batch, h, w, heads, head_dim]` and `lse` ([`lse_elements`]) of the inputs.
///
/// # Errors
/// As [`check`], and on shapes that no grid covers.
pub fn forward(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    out: device_ptr,
    lse: device_ptr,
) -> Result<Launch> {
    let &Inputs { qkv, tables, pad } = inputs;
    let [rel_pos_h, rel_pos_w] = tables;
    let addresses = [qkv, rel_pos_h, rel_pos_w, pad, out, lse];
    let tile = check(FORWARD, problem, dtype, &addresses)?;
    let params = RelPosAttentionFwdParams { qkv, tables, pad, out, lse, shape: shape(problem) };
    let threads = 32 * tile.warps as u32;
    let grid = [query_blocks(problem, &tile), 1, 1];
    let launch = Launch::new(&tile.instance(FORWARD), dtype, grid, threads, &params)?;
    Ok(Launch { shared_bytes: tile.forward_shared_bytes(problem, dtype) as u32, ..launch })
}

/// The addresses of the backward's operands besides the inputs, all of the inputs' dtype but `lse` and `workspace`.
#[derive(Clone, Copy, Debug)]
pub struct BackwardOperands {
    /// The forward's output.
    pub out: device_ptr,
    /// The forward's, f32.
    pub lse: device_ptr,
    /// Gradient of the output.
    pub dout: device_ptr,
    /// Output, shaped as qkv.
    pub dqkv: device_ptr,
    /// Output, shaped as the tables; 0 if they are frozen or absent.
    pub dtables: device_ptr,
    /// Output, shaped as pad; its part for q is zero. 0 if it is frozen or absent.
    pub dpad: device_ptr,
    /// [`workspace_bytes`] bytes, aligned to 16.
    pub workspace: device_ptr,
}

/// Where things lie in the backward's scratch memory, in bytes from its start; all f32.
struct Workspace {
    delta: u64,
    table_partials: u64,
    pad_partials: u64,
    bytes: u64,
}

impl Workspace {
    /// `[units, tokens]` biases, delta, then the partial sums of what is trained.
    fn new(
        p: &AttentionProblem,
        dtype: DType,
        tile: &Tile,
        [train_tables, train_pad]: [bool; 2],
        gpu: &Gpu,
    ) -> Self {
        let rows = rows(p);
        let delta = 4 * rows * bias_pitch(p);
        // Hopper's query pass adds to them two at a time.
        let table_partials = (delta + 4 * rows * statistics(dtype)).next_multiple_of(16);
        let parts = if train_tables { table_parts(p, tile, gpu) as usize } else { 0 };
        let pad_partials = table_partials + 4 * parts * table_elements(p);
        let parts = if train_pad { pad_parts(p) } else { 0 };
        let bytes = pad_partials + 4 * parts * 3 * p.channels();
        let [delta, table_partials, pad_partials, bytes] =
            [delta, table_partials, pad_partials, bytes].map(|bytes| bytes as u64);
        Self { delta, table_partials, pad_partials, bytes }
    }
}

/// Biases that the query pass leaves for a query: rel_h and rel_w, each rounded up to whole key tiles.
pub(in crate::launch) fn bias_pitch(p: &AttentionProblem) -> usize {
    p.side_h.next_multiple_of(KEY_SIDE) + p.side_w.next_multiple_of(KEY_SIDE)
}

/// Elements of both tables.
pub(in crate::launch) fn table_elements(p: &AttentionProblem) -> usize {
    let (h, w) = p.table_rows();
    (h + w) * p.head_dim
}

/// Blocks of the query pass if the tables are trained: few, since each has a copy of the tables' gradients.
fn table_parts(p: &AttentionProblem, tile: &Tile, gpu: &Gpu) -> u64 {
    query_blocks(p, tile).min(2 * gpu.persistent_blocks())
}

/// Key tiles of a window in the key pass.
fn key_tiles(p: &AttentionProblem) -> usize {
    p.side_h.div_ceil(KEY_SIDE) * p.side_w.div_ceil(KEY_SIDE)
}

fn pad_parts(p: &AttentionProblem) -> usize {
    p.windows() * key_tiles(p)
}

/// Scratch memory of the backward; `trained` says whether the tables and the pad are.
///
/// # Errors
/// As [`check`].
pub fn workspace_bytes(
    problem: &AttentionProblem,
    dtype: DType,
    trained: [bool; 2],
    gpu: &Gpu,
) -> Result<usize> {
    let tile = check(BY_QUERY, problem, dtype, &[])?;
    Ok(Workspace::new(problem, dtype, &tile, trained, gpu).bytes as usize)
}

/// What the passes of the backward hand on: addresses in its scratch memory.
#[derive(Clone, Copy, Debug)]
pub(in crate::launch) struct BetweenPasses {
    /// f32 `[units, tokens, side_h + side_w, each rounded up to 8]`
    pub bias: device_ptr,
    /// f32 `[units, tokens]`, or `[units, tokens, 4]` with f32 operands; see [`statistics`].
    pub delta: device_ptr,
    /// f32 `[blocks of the query pass, rows of the tables, head_dim]`, or 0 if they are not trained.
    pub table_partials: device_ptr,
    /// Most of those blocks.
    pub table_parts: u64,
    /// f32 `[windows, key tiles, 3, heads, head_dim]`, or 0 if the pad is not trained.
    pub pad_partials: device_ptr,
}

impl BetweenPasses {
    /// In the workspace of [`workspace_bytes`].
    pub(in crate::launch) fn new(
        p: &AttentionProblem,
        dtype: DType,
        operands: &BackwardOperands,
        gpu: &Gpu,
    ) -> Result<Self> {
        let &BackwardOperands { dtables, dpad, workspace, .. } = operands;
        let tile = check(BY_QUERY, p, dtype, &[])?;
        let at = Workspace::new(p, dtype, &tile, [dtables != 0, dpad != 0], gpu);
        let present = |output, partials| if output == 0 { 0 } else { workspace + partials };
        Ok(Self {
            bias: workspace,
            delta: workspace + at.delta,
            table_partials: present(dtables, at.table_partials),
            table_parts: table_parts(p, &tile, gpu),
            pad_partials: present(dpad, at.pad_partials),
        })
    }

    /// The tables' gradients from those of so many blocks.
    pub(in crate::launch) fn sum_tables(
        &self,
        p: &AttentionProblem,
        dtype: DType,
        blocks: u64,
        dtables: device_ptr,
    ) -> Result<Launch> {
        let size = table_elements(p) as u64;
        sum_partials::launch(dtype, self.table_partials, dtables, blocks, size)
    }
}

/// The gradients, in two to four launches, in this order: by queries, by keys, sums for the tables and for the pad.
///
/// # Errors
/// As [`check`], and on shapes that no grid covers.
pub fn backward(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    operands: &BackwardOperands,
    gpu: &Gpu,
) -> Result<Vec<Launch>> {
    let &Inputs { qkv, tables, pad } = inputs;
    let &BackwardOperands { out, lse, dout, dqkv, dtables, dpad, .. } = operands;
    let [rel_pos_h, rel_pos_w] = tables;
    let addresses = [qkv, rel_pos_h, rel_pos_w, pad, out, lse, dout, dqkv, dtables, dpad];
    let tile = check(BY_QUERY, problem, dtype, &addresses)?;
    let between = BetweenPasses::new(problem, dtype, operands, gpu)?;
    let BetweenPasses { bias, delta, table_partials, table_parts, pad_partials } = between;
    let shape = shape(problem);

    let items = query_blocks(problem, &tile);
    let params = RelPosAttentionBwdQueryParams {
        qkv,
        tables,
        pad,
        out,
        lse,
        dout,
        dqkv,
        bias,
        delta,
        table_partials,
        items,
        shape,
    };
    let blocks = if dtables == 0 { items } else { table_parts };
    let threads = 32 * tile.warps as u32;
    let by_query = Launch::new(&tile.instance(BY_QUERY), dtype, [blocks, 1, 1], threads, &params)?;
    let shared_bytes = tile.backward_shared_bytes(problem, dtype) as u32;
    let mut launches = vec![Launch { shared_bytes, ..by_query }];

    let params =
        RelPosAttentionBwdKeyParams { qkv, pad, dout, bias, delta, dqkv, pad_partials, shape };
    let units = problem.windows() * problem.num_heads;
    let grid = [units as u64 * key_tiles(problem) as u64, 1, 1];
    let family = format!("rel_pos_attention_bwd_key_hd{}", tile.dim);
    let by_key = Launch::new(&family, dtype, grid, 32 * REL_POS_ATTENTION_KEY_WARPS, &params)?;
    launches.push(Launch { shared_bytes: key_shared_bytes(tile.dim, dtype) as u32, ..by_key });

    if dtables != 0 {
        launches.push(between.sum_tables(problem, dtype, blocks, dtables)?);
    }
    if dpad != 0 {
        let (parts, size) = (pad_parts(problem) as u64, 3 * problem.channels() as u64);
        launches.push(sum_partials::launch(dtype, pad_partials, dpad, parts, size)?);
    }
    Ok(launches)
}

/// Two stages of the key pass: q and the output's gradient, biases in rows of 12, [`statistics`]; in f32 keys and values
/// too.
fn key_shared_bytes(dim: usize, dtype: DType) -> usize {
    let row = (dim + REL_POS_ATTENTION_ROW_PAD as usize) * dtype.size_in_bytes();
    let stages =
        |queries: u32| 2 * queries as usize * (2 * row + 4 * (12 + 12 + statistics(dtype)));
    match dtype {
        DType::F32 => stages(REL_POS_ATTENTION_KEY_QUERIES_F32) + 2 * KEY_SIDE * KEY_SIDE * row,
        _ => stages(REL_POS_ATTENTION_KEY_QUERIES),
    }
}

/// Blocks of queries of all heads of all windows.
fn query_blocks(problem: &AttentionProblem, tile: &Tile) -> u64 {
    let units = problem.windows() * problem.num_heads;
    units as u64 * problem.tokens().div_ceil(tile.queries()) as u64
}

#[cfg(test)]
pub(in crate::launch) mod tests {
    use super::*;

    /// SAM's ViT-B, for Hopper's launches too.
    pub const GLOBAL: AttentionProblem = AttentionProblem {
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
    const WINDOWED: AttentionProblem = AttentionProblem { side_h: 14, side_w: 14, ..GLOBAL };

    fn operands(dtables: device_ptr, dpad: device_ptr) -> BackwardOperands {
        BackwardOperands { out: 4, lse: 8, dout: 12, dqkv: 16, dtables, dpad, workspace: 1024 }
    }

    const INPUTS: Inputs = Inputs { qkv: 64, tables: [128, 256], pad: 192 };

    #[test]
    fn every_row_of_the_table_is_row_aligned_and_has_its_use() {
        let wide = Some(Tile { dim: 64, cols: 64, rows: 1, warps: 4 });
        assert_eq!(tile(FORWARD, &GLOBAL, DType::BF16), wide);
        assert_eq!(tile(FORWARD, &GLOBAL, DType::F16), wide);
        let narrow = Tile { dim: 64, cols: 16, rows: 4, warps: 7 };
        assert_eq!(tile(FORWARD, &WINDOWED, DType::BF16), Some(narrow));
        let f32 = Tile { dim: 64, cols: 16, rows: 2, warps: 4 };
        assert_eq!(tile(FORWARD, &GLOBAL, DType::F32), Some(f32));
        let middle = Tile { dim: 64, cols: 40, rows: 2, warps: 4 };
        for (side, expected) in
            [(14, narrow), (32, narrow), (48, narrow), (40, middle), (37, middle)]
        {
            let problem = AttentionProblem { side_h: side, side_w: side, ..GLOBAL };
            assert_eq!(tile(FORWARD, &problem, DType::F16), Some(expected), "{side}");
        }
        for (head_dim, dim) in [(1, 16), (14, 16), (32, 32), (33, 64), (80, 80)] {
            let problem = AttentionProblem { head_dim, ..WINDOWED };
            assert_eq!(tile(FORWARD, &problem, DType::BF16).map(|tile| tile.dim), Some(dim));
        }
        for tile in [wide, Some(narrow), Some(middle), Some(f32)].into_iter().flatten() {
            assert_eq!((tile.cols % 8, tile.rows * tile.cols % 16), (0, 0), "{tile:?}");
        }
    }

    #[test]
    fn every_query_of_every_head_has_a_place_in_a_block() -> Result<()> {
        let launch = forward(&GLOBAL, DType::BF16, &INPUTS, 4, 8)?;
        assert_eq!(launch.kernel, "rel_pos_attention_fwd_hd64_cols64_bf16");
        assert_eq!((launch.grid, launch.block), ([4 * 12 * 64, 1, 1], [128, 1, 1]));
        // Two stages of 64 keys and values of 72 elements; 65 and 72 biases of 64 queries.
        assert_eq!(launch.shared_bytes, 4 * 64 * 72 * 2 + 64 * (65 + 72) * 4);
        let launch = forward(&WINDOWED, DType::F16, &INPUTS, 4, 8)?;
        assert_eq!(launch.kernel, "rel_pos_attention_fwd_hd64_cols16_f16");
        // 25 windows an image, 196 queries in blocks of 112.
        assert_eq!((launch.grid, launch.block), ([4 * 25 * 12 * 2, 1, 1], [224, 1, 1]));
        Ok(())
    }

    #[test]
    fn the_backward_sums_only_what_is_trained() -> Result<()> {
        let names = |dtables, dpad| -> Result<Vec<String>> {
            let operands = operands(dtables, dpad);
            let launches = backward(&WINDOWED, DType::BF16, &INPUTS, &operands, &Gpu::H100)?;
            Ok(launches.into_iter().map(|launch| launch.kernel).collect())
        };
        let passes =
            ["rel_pos_attention_bwd_query_hd64_cols16_bf16", "rel_pos_attention_bwd_key_hd64_bf16"];
        assert_eq!(names(0, 0)?, passes);
        assert_eq!(names(256, 0)?.len(), 3);
        assert_eq!(names(256, 260)?[2..], ["sum_partials_bf16", "sum_partials_bf16"]);
        Ok(())
    }

    #[test]
    fn the_workspace_does_not_grow_with_the_square_of_the_tokens() -> Result<()> {
        let bytes = |problem, train| workspace_bytes(problem, DType::BF16, [train; 2], &Gpu::H100);
        // An image and layer: 128 biases and delta for 12 x 4096 queries.
        assert_eq!(bytes(&GLOBAL, false)? / 4, 12 * 4096 * (128 + 1) * 4);
        let rows = 4 * 25 * 12 * 196;
        let sums = 264 * 2 * 27 * 64 + 4 * 25 * 4 * 3 * 768;
        assert_eq!(bytes(&WINDOWED, true)?, 4 * (rows * (32 + 1) + sums));
        Ok(())
    }

    #[test]
    fn what_the_kernels_do_not_cover_is_refused_with_the_reason() {
        let refused = |problem, dtype, address: device_ptr, word: &str| {
            let message = check(FORWARD, &problem, dtype, &[address]).unwrap_err().to_string();
            assert!(message.contains(word), "{message}");
        };
        refused(AttentionProblem { head_dim: 81, ..GLOBAL }, DType::F32, 0, "head_dim");
        refused(AttentionProblem { head_dim: 15, ..GLOBAL }, DType::BF16, 0, "multiples of 4");
        refused(GLOBAL, DType::BF16, 6, "multiples of 4");
        refused(GLOBAL, DType::F64, 0, "F64");
        let huge = AttentionProblem { side_h: 400, side_w: 400, ..GLOBAL };
        refused(huge, DType::F32, 0, "shared memory");
    }
}
