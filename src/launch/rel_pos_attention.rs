//! Attention with relative positions: `kernels/rel_pos_attention_fwd.cuh`, and the two passes of its backward.

use super::bindings::{
    device_ptr, RelPosAttentionFwdParams, RelPosAttentionShape, REL_POS_ATTENTION_COLS16_ROWS,
    REL_POS_ATTENTION_COLS16_WARPS, REL_POS_ATTENTION_COLS64_ROWS, REL_POS_ATTENTION_COLS64_WARPS,
    REL_POS_ATTENTION_F32_ROWS, REL_POS_ATTENTION_F32_WARPS, REL_POS_ATTENTION_ROW_PAD,
};
use super::{dropout, AttentionProblem, Launch};
use candle_core::{bail, DType, Result};

const OP: &str = "rel-pos-attention";
/// Shared memory that a block may have on the smallest of the devices from sm_80 on with a data centre's name: A100.
const SHARED_BYTES: usize = 163 << 10;

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

/// Which tile a problem gets, if any.
///
/// | dtype | head_dim | width | tile | why |
/// |---|---|---|---|---|
/// | f16, bf16 | 33 to 80 | pads to 64 no worse than to 16 | 1 x 64, 4 warps | one rel_h for 64 keys; a block of 64 queries is one query row of SAM's 64 x 64 |
/// | f16, bf16 | any | any | 4 x 16, 7 warps | a window's row of 14 is 16; its 196 queries are two blocks of 112 |
/// | f32 | any | any | 2 x 16, 4 warps | twice the bytes: half the keys keep two stages under 99 KiB |
pub fn tile(problem: &AttentionProblem, dtype: DType) -> Option<Tile> {
    let dim = *DIMS.iter().find(|&&dim| dim >= problem.head_dim)?;
    let padded = |cols: usize| problem.side_w.next_multiple_of(cols);
    let (cols, rows, warps) = match dtype {
        DType::F32 => (16, REL_POS_ATTENTION_F32_ROWS, REL_POS_ATTENTION_F32_WARPS),
        DType::F16 | DType::BF16 if dim >= 64 && padded(64) == padded(16) => {
            (64, REL_POS_ATTENTION_COLS64_ROWS, REL_POS_ATTENTION_COLS64_WARPS)
        }
        DType::F16 | DType::BF16 => {
            (16, REL_POS_ATTENTION_COLS16_ROWS, REL_POS_ATTENTION_COLS16_WARPS)
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

    /// Floats of a query's biases, as [`Biases` in rel_pos_attention.cuh] lays them out: rel_h, rel_w.
    fn bias_strides(&self, problem: &AttentionProblem) -> (usize, usize) {
        (problem.side_h.next_multiple_of(self.rows) | 1, problem.side_w.next_multiple_of(self.cols))
    }

    fn forward_shared_bytes(&self, problem: &AttentionProblem, dtype: DType) -> usize {
        let (h, w) = self.bias_strides(problem);
        self.stage_bytes(dtype) + 4 * self.queries() * (h + w)
    }

    fn family(&self, pass: &str) -> String {
        format!("rel_pos_attention_{pass}_hd{}_cols{}", self.dim, self.cols)
    }
}

fn shape(p: &AttentionProblem) -> RelPosAttentionShape {
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
pub fn check(problem: &AttentionProblem, dtype: DType, addresses: &[device_ptr]) -> Result<Tile> {
    let Some(tile) = tile(problem, dtype) else {
        bail!(
            "{OP}: kernels are for f32, f16 and bf16 and head_dim up to 80, got {dtype:?} and {}",
            problem.head_dim
        )
    };
    if problem.head_dim * dtype.size_in_bytes() % 4 != 0 || addresses.iter().any(|a| a % 4 != 0) {
        bail!(
            "{OP}: a head of {} {dtype:?} must start and end at multiples of 4 bytes",
            problem.head_dim
        )
    }
    let bytes = tile.forward_shared_bytes(problem, dtype);
    if bytes > SHARED_BYTES {
        bail!("{OP}: windows of {} x {} tokens need {bytes} bytes of shared memory a block, over {SHARED_BYTES}", problem.side_h, problem.side_w)
    }
    Ok(tile)
}

/// The addresses of the inputs, all of one dtype; 0 where absent.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// `[batch, h, w, 3, heads, head_dim]`
    pub qkv: device_ptr,
    /// rel_pos_h, then rel_pos_w: `[2 side_h - 1 + 2 side_w - 1, head_dim]`; 0 without relative positions.
    pub tables: device_ptr,
    /// What a token outside the grid projects to, `[3, heads, head_dim]`; 0 for zeros.
    pub pad: device_ptr,
}

/// Elements of `lse`, f32: `[windows, heads, tokens]`, of which a window's tokens on the grid come first, in order.
pub fn lse_elements(problem: &AttentionProblem) -> usize {
    problem.windows() * problem.num_heads * problem.tokens()
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
    let tile = check(problem, dtype, &[qkv, tables, pad, out, lse])?;
    let params = RelPosAttentionFwdParams { qkv, tables, pad, out, lse, shape: shape(problem) };
    let threads = 32 * tile.warps as u32;
    let launch =
        Launch::new(&tile.family("fwd"), dtype, query_grid(problem, &tile), threads, &params)?;
    Ok(Launch { shared_bytes: tile.forward_shared_bytes(problem, dtype) as u32, ..launch })
}

/// A block for every block of queries of every head of every window.
fn query_grid(problem: &AttentionProblem, tile: &Tile) -> [u64; 3] {
    let units = problem.windows() * problem.num_heads;
    [units as u64 * problem.tokens().div_ceil(tile.queries()) as u64, 1, 1]
}
