//! Attention in windows on Hopper, `kernels/sm90/rel_pos_attention_window_{fwd,bwd}_sm90.cuh`: windows of up to 14 x 14
//! tokens, hanging over the grid or not, in f16 and bf16, heads of 64 or 80 channels. What they do not cover is for
//! [`super::rel_pos_attention_sm90`] and the portable kernels.

use super::bindings::{
    device_ptr, RelPosAttentionWindowFwdParams, REL_POS_ATTENTION_WINDOW_SM90_BLOCKS,
    REL_POS_ATTENTION_WINDOW_SM90_FWD_HD64_SHARED_BYTES,
    REL_POS_ATTENTION_WINDOW_SM90_FWD_HD80_SHARED_BYTES, REL_POS_ATTENTION_WINDOW_SM90_SIDE,
    REL_POS_ATTENTION_WINDOW_SM90_THREADS,
};
use super::rel_pos_attention::{shape, Inputs};
use super::{AttentionProblem, Launch};
use candle_core::{DType, Result};

/// Whether the kernels cover a problem with operands at these addresses.
fn covers(problem: &AttentionProblem, dtype: DType, addresses: &[device_ptr]) -> bool {
    let side = REL_POS_ATTENTION_WINDOW_SM90_SIDE as usize;
    matches!(dtype, DType::F16 | DType::BF16)
        && [64, 80].contains(&problem.head_dim)
        && problem.side_h.max(problem.side_w) <= side
        && addresses.iter().all(|address| address.is_multiple_of(16))
}

/// Heads of all windows.
fn units(problem: &AttentionProblem) -> usize {
    problem.windows() * problem.num_heads
}

/// Blocks that take turns at the units: one for each multiprocessor, or fewer.
fn blocks(problem: &AttentionProblem) -> u64 {
    (units(problem) as u64).min(REL_POS_ATTENTION_WINDOW_SM90_BLOCKS.into())
}

/// A pass's kernel with the shared memory that it takes for heads of 64 and of 80 channels.
fn launch<P: bytemuck::NoUninit>(
    pass: &str,
    problem: &AttentionProblem,
    dtype: DType,
    shared_bytes: [u32; 2],
    params: &P,
) -> Result<Launch> {
    let family = format!("rel_pos_attention_window_{pass}_sm90_hd{}", problem.head_dim);
    let grid = [blocks(problem), 1, 1];
    let launch = Launch::new(&family, dtype, grid, REL_POS_ATTENTION_WINDOW_SM90_THREADS, params)?;
    Ok(Launch { shared_bytes: shared_bytes[usize::from(problem.head_dim > 64)], ..launch })
}

/// What [`super::rel_pos_attention::forward`] launches, for windows on Hopper; none where its kernels do not cover the
/// problem.
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
    let &Inputs { qkv, tables, pad } = inputs;
    if !covers(problem, dtype, &[qkv, tables, pad, out]) {
        return Ok(None);
    }
    let (units, shape) = (units(problem) as u64, shape(problem));
    let params = RelPosAttentionWindowFwdParams { qkv, tables, pad, out, lse, units, shape };
    let shared_bytes = [
        REL_POS_ATTENTION_WINDOW_SM90_FWD_HD64_SHARED_BYTES,
        REL_POS_ATTENTION_WINDOW_SM90_FWD_HD80_SHARED_BYTES,
    ];
    launch("fwd", problem, dtype, shared_bytes, &params).map(Some)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// SAM's ViT-B.
    const WINDOWED: AttentionProblem = AttentionProblem {
        batch: 1,
        h: 64,
        w: 64,
        num_heads: 12,
        head_dim: 64,
        side_h: 14,
        side_w: 14,
        softmax_scale: 0.125,
        rel_pos: true,
        dropout: None,
    };
    const INPUTS: Inputs = Inputs { qkv: 64, tables: 128, pad: 192 };

    #[test]
    fn blocks_take_turns_at_heads_of_windows() -> Result<()> {
        let of = |problem| forward(&problem, DType::BF16, &INPUTS, 16, 4);
        let launch = of(WINDOWED)?.unwrap();
        assert_eq!(launch.kernel, "rel_pos_attention_window_fwd_sm90_hd64_bf16");
        assert_eq!((launch.grid, launch.block), ([132, 1, 1], [448, 1, 1]));
        let small = AttentionProblem { h: 14, w: 14, ..WINDOWED };
        assert_eq!(of(small)?.unwrap().grid, [12, 1, 1]);
        Ok(())
    }

    #[test]
    fn the_rest_is_other_kernels() -> Result<()> {
        let covered =
            |problem, dtype| Ok::<_, candle_core::Error>(forward(&problem, dtype, &INPUTS, 16, 4)?.is_some());
        assert!(covered(WINDOWED, DType::F16)?);
        assert!(!covered(WINDOWED, DType::F32)?);
        assert!(!covered(AttentionProblem { side_w: 15, ..WINDOWED }, DType::F16)?);
        assert!(!covered(AttentionProblem { head_dim: 32, ..WINDOWED }, DType::F16)?);
        let unaligned = Inputs { pad: 200, ..INPUTS };
        assert!(forward(&WINDOWED, DType::F16, &unaligned, 16, 4)?.is_none());
        Ok(())
    }
}
