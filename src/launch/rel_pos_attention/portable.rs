//! Attention with relative positions: `kernels/rel_pos_attention/fwd.cuh`, and the two passes of its backward.

use crate::launch::bindings::{
    device_ptr, RelPosAttentionBwdKeyParams, RelPosAttentionBwdQueryParams,
    RelPosAttentionFwdParams, RelPosAttentionShape, REL_POS_ATTENTION_KEY_SIDE,
    REL_POS_ATTENTION_KEY_WARPS,
};
use crate::launch::rel_pos_attention::tiles::{self, KeyTile, Tile};
use crate::launch::slots::mask;
use crate::launch::{sum_partials, AttentionProblem, Gpu, Launch};
use candle_core::{bail, DType, Result};

const OP: &str = AttentionProblem::OP;
const FORWARD: &str = "rel_pos_attention_fwd";
const BY_QUERY: &str = "rel_pos_attention_bwd_query";
/// Shared memory that a block may have on an A100; the kernels' demand grows with the sides of the window.
const SHARED_BYTES: usize = 163 << 10;
/// Key tiles of the backward's key pass are squares, the biases' rows are padded to whole ones.
const KEY_SIDE: usize = REL_POS_ATTENTION_KEY_SIDE as usize;

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
        dropout: mask(p.dropout),
    }
}

/// The tile that the problem gets, of `cols` columns if those are forced, where its kernels take the operands.
///
/// # Errors
/// As `check_tile`, and on other dtypes than f32, f16 and bf16, and heads of more than 80 channels.
pub fn check(
    problem: &AttentionProblem,
    dtype: DType,
    cols: Option<usize>,
    addresses: &[device_ptr],
) -> Result<&'static Tile> {
    let Some(tile) = tiles::pick(problem, dtype, cols) else {
        bail!(
            "{OP}: kernels are for f32, f16 and bf16 and head_dim up to 80, got {dtype:?} and {}",
            problem.head_dim
        )
    };
    check_tile(tile, problem, dtype, addresses)?;
    Ok(tile)
}

/// Whether a tile's kernels take a problem with operands at these addresses.
///
/// # Errors
/// - a head of 16-bit channels is of an odd number of them, or an address is no multiple of 4;
/// - the forward does not take the scale or the height of the window ([`Tile::takes`]);
/// - the biases of the grid do not fit into shared memory.
fn check_tile(
    tile: &Tile,
    problem: &AttentionProblem,
    dtype: DType,
    addresses: &[device_ptr],
) -> Result<()> {
    let aligned = (problem.head_dim * dtype.size_in_bytes()).is_multiple_of(4);
    if !aligned || addresses.iter().any(|a| !a.is_multiple_of(4)) {
        bail!(
            "{OP}: a head of {} {dtype:?} must start and end at multiples of 4 bytes",
            problem.head_dim
        )
    }
    if !tile.takes(problem) {
        bail!("{OP}: the forward of {tile:?} does not take {problem:?}")
    }
    let bytes = tile.backward_shared_bytes(problem);
    if bytes > SHARED_BYTES {
        let (side_h, side_w) = (problem.side_h, problem.side_w);
        bail!(
            "{OP}: windows of {side_h} x {side_w} tokens need {bytes} bytes of shared memory a block, over \
             {SHARED_BYTES}"
        )
    }
    Ok(())
}

/// Shared memory that the largest of a problem's blocks takes, forward and backward, if the kernels cover it; some
/// devices have less than the A100's.
pub fn shared_bytes(problem: &AttentionProblem, dtype: DType) -> Option<usize> {
    let tile = check(problem, dtype, None, &[]).ok()?;
    Some(tile.backward_shared_bytes(problem).max(tile.key_tile()?.bytes))
}

/// The addresses of the inputs, all of one dtype; 0 where absent.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[batch, h, w, 3, heads, head_dim]`
    pub qkv: device_ptr,
    /// rel_pos_h `[2 side_h - 1, head_dim]` and rel_pos_w `[2 side_w - 1, head_dim]`; 0 without relative positions.
    pub tables: [device_ptr; 2],
    /// Projection of a token outside the grid, `[3, heads, head_dim]`; 0 for zeros.
    pub pad: device_ptr,
}

/// Heads of all windows times their tokens; of a window's, those on the grid come first, in order.
pub(in crate::launch) fn rows(problem: &AttentionProblem) -> usize {
    problem.windows() * problem.num_heads * problem.tokens()
}

/// Elements of `lse`, f32: `[windows, heads, tokens]`. With f32 operands `[windows, heads, tokens, 2]`, the maximum in
/// base 2 and the sum.
pub fn lse_elements(problem: &AttentionProblem, dtype: DType) -> usize {
    rows(problem) * if dtype == DType::F32 { 2 } else { 1 }
}

/// Numbers of a query that the passes of the backward share: delta. In f32 also the maximum, the inverse of the sum,
/// and a place not used.
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
    forward_with(check(problem, dtype, None, &[])?, problem, dtype, inputs, [out, lse])
}

/// The forward with this tile, to `out` and `lse`.
///
/// # Errors
/// As [`forward`].
pub fn forward_with(
    tile: &Tile,
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    [out, lse]: [device_ptr; 2],
) -> Result<Launch> {
    let &Inputs { qkv, tables, pad } = inputs;
    let [rel_pos_h, rel_pos_w] = tables;
    check_tile(tile, problem, dtype, &[qkv, rel_pos_h, rel_pos_w, pad, out, lse])?;
    let params = RelPosAttentionFwdParams { qkv, tables, pad, out, lse, shape: shape(problem) };
    let threads = 32 * tile.warps as u32;
    let grid = [tile.forward_blocks(problem), 1, 1];
    let launch = Launch::new(&tile.instance(FORWARD), dtype, grid, threads, &params)?;
    Ok(Launch { shared_bytes: tile.forward_shared_bytes(problem) as u32, ..launch })
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

impl BackwardOperands {
    /// Whether the tables, and the pad, are trained.
    pub(in crate::launch) fn trained(&self) -> [bool; 2] {
        [self.dtables != 0, self.dpad != 0]
    }
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
    tile.blocks(p).min(2 * gpu.persistent_blocks())
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
    let tile = check(problem, dtype, gpu.forced.attention_cols, &[])?;
    Ok(Workspace::new(problem, dtype, tile, trained, gpu).bytes as usize)
}

/// Results of one backward pass for the next: addresses in its scratch memory.
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
        let tile = check(p, dtype, gpu.forced.attention_cols, &[])?;
        let at = Workspace::new(p, dtype, tile, operands.trained(), gpu);
        let present = |output, partials| if output == 0 { 0 } else { workspace + partials };
        Ok(Self {
            bias: workspace,
            delta: workspace + at.delta,
            table_partials: present(dtables, at.table_partials),
            table_parts: table_parts(p, tile, gpu),
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
    let tile = check(problem, dtype, gpu.forced.attention_cols, &addresses)?;
    let Some(KeyTile { head_dim: key_head_dim, bytes: key_bytes, .. }) = tile.key_tile() else {
        bail!("{OP}: no key pass stands beside {tile:?}")
    };
    let between = BetweenPasses::new(problem, dtype, operands, gpu)?;
    let BetweenPasses { bias, delta, table_partials, table_parts, pad_partials } = between;
    let shape = shape(problem);

    let items = tile.blocks(problem);
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
    let shared_bytes = tile.backward_shared_bytes(problem) as u32;
    let mut launches = vec![Launch { shared_bytes, ..by_query }];

    let params =
        RelPosAttentionBwdKeyParams { qkv, pad, dout, bias, delta, dqkv, pad_partials, shape };
    let units = problem.windows() * problem.num_heads;
    let grid = [units as u64 * key_tiles(problem) as u64, 1, 1];
    let family = format!("rel_pos_attention_bwd_key_hd{key_head_dim}");
    let by_key = Launch::new(&family, dtype, grid, 32 * REL_POS_ATTENTION_KEY_WARPS, &params)?;
    launches.push(Launch { shared_bytes: *key_bytes as u32, ..by_key });

    if dtables != 0 {
        launches.push(between.sum_tables(problem, dtype, blocks, dtables)?);
    }
    if dpad != 0 {
        let (parts, size) = (pad_parts(problem) as u64, 3 * problem.channels() as u64);
        launches.push(sum_partials::launch(dtype, pad_partials, dpad, parts, size)?);
    }
    Ok(launches)
}

#[cfg(test)]
pub(in crate::launch) mod tests {
    use super::*;
    use crate::launch::tiles::Forced;

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
    fn any_tile_can_be_launched_and_fits() -> Result<()> {
        for (head_dim, side) in
            [(64, 64), (80, 64), (64, 14), (80, 14), (64, 40), (80, 48), (16, 14)]
        {
            for dtype in [DType::F32, DType::F16, DType::BF16] {
                let grid = AttentionProblem { head_dim, h: side, w: side, ..GLOBAL };
                let problem = AttentionProblem { side_h: side, side_w: side, ..grid };
                for tile in tiles::candidates(&problem, dtype) {
                    let forward = forward_with(tile, &problem, dtype, &INPUTS, [4, 8])?;
                    let forced = Forced { attention_cols: Some(tile.cols), ..Forced::NONE };
                    let (gpu, operands) = (Gpu { forced, ..Gpu::A100 }, operands(256, 260));
                    let mut launches = backward(&problem, dtype, &INPUTS, &operands, &gpu)?;
                    launches.push(forward);
                    let of_tile = format!("_hd{head_dim}_cols{}_", tile.cols);
                    let named = launches.iter().filter(|launch| launch.kernel.contains(&of_tile));
                    assert_eq!(named.count(), 2, "{tile:?}");
                    let most = launches.iter().map(|launch| launch.shared_bytes).max();
                    assert!(most <= Some(SHARED_BYTES as u32), "{tile:?}: {most:?}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn every_query_of_every_head_has_a_place_in_a_block() -> Result<()> {
        let launch = forward(&GLOBAL, DType::BF16, &INPUTS, 4, 8)?;
        assert_eq!(launch.kernel, "rel_pos_attention_fwd_hd64_cols64_bf16");
        assert_eq!((launch.grid, launch.block), ([4 * 12 * 32, 1, 1], [128, 1, 1]));
        // Two stages of 64 keys and values of 72 elements; 65 biases of 128 queries.
        assert_eq!(launch.shared_bytes, 4 * 64 * 72 * 2 + 128 * 65 * 4);
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
            let message = check(&problem, dtype, None, &[address]).unwrap_err().to_string();
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
