//! Attention in windows on Hopper, `kernels/rel_pos_attention/sm90/window_{fwd,bwd}.cuh`. Windows have up to 14 x 14
//! tokens, hanging over the grid or not, in f16 and bf16, with heads of 64 or 80 channels.
//! [`crate::launch::rel_pos_attention::sm90::forward`] and the portable kernels serve the other problems.

use crate::launch::bindings::{
    device_ptr, Params, RelPosAttentionWindowBwdParams, RelPosAttentionWindowFwdParams,
    REL_POS_ATTENTION_WINDOW_SM90_SIDE, REL_POS_ATTENTION_WINDOW_SM90_THREADS,
};
use crate::launch::rel_pos_attention::portable::{shape, table_elements, BackwardOperands, Inputs};
use crate::launch::rel_pos_attention::sm90::tiles::{self as window_tiles, WindowTile};
use crate::launch::{sum_partials, AttentionProblem, Gpu, Launch};
use candle_core::{DType, Result};

/// The tile of a problem with operands at these addresses, if the kernels cover it.
pub(in crate::launch) fn pick(
    problem: &AttentionProblem,
    dtype: DType,
    addresses: &[device_ptr],
) -> Option<&'static WindowTile> {
    let side = REL_POS_ATTENTION_WINDOW_SM90_SIDE as usize;
    let covered = matches!(dtype, DType::F16 | DType::BF16)
        && problem.side_h.max(problem.side_w) <= side
        && addresses.iter().all(|address| address.is_multiple_of(16));
    window_tiles::window(problem.head_dim).filter(|_| covered)
}

/// Heads of all windows.
fn units(problem: &AttentionProblem) -> usize {
    problem.windows() * problem.num_heads
}

/// Blocks that take turns at the units: one for each multiprocessor, or fewer.
fn blocks(problem: &AttentionProblem, gpu: &Gpu) -> u64 {
    (units(problem) as u64).min(gpu.persistent_blocks())
}

/// A pass's kernel in so many blocks, with the shared memory that each takes.
fn launch<P: Params>(
    pass: &str,
    problem: &AttentionProblem,
    dtype: DType,
    (blocks, shared_bytes): (u64, usize),
    params: &P,
) -> Result<Launch> {
    let family = format!("rel_pos_attention_window_{pass}_sm90_hd{}", problem.head_dim);
    let grid = [blocks, 1, 1];
    let launch = Launch::new(&family, dtype, grid, REL_POS_ATTENTION_WINDOW_SM90_THREADS, params)?;
    Ok(Launch { shared_bytes: shared_bytes as u32, ..launch })
}

/// Hopper launches of [`crate::launch::rel_pos_attention::forward`] for windows; none where the kernels do not cover
/// the problem.
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
    let &Inputs { qkv, tables, pad } = inputs;
    let Some(tile) = pick(problem, dtype, &[qkv, tables[0], tables[1], pad, out]) else {
        return Ok(None);
    };
    let (units, shape) = (units(problem) as u64, shape(problem));
    let params = RelPosAttentionWindowFwdParams { qkv, tables, pad, out, lse, units, shape };
    launch("fwd", problem, dtype, (blocks(problem, gpu), tile.forward_bytes), &params).map(Some)
}

/// Where the blocks' sums for pad begin in the workspace, behind those for the tables, and its size in bytes.
fn workspace(p: &AttentionProblem, [train_tables, train_pad]: [bool; 2], gpu: &Gpu) -> [u64; 2] {
    let floats = |wanted: bool, size: usize| if wanted { blocks(p, gpu) * size as u64 } else { 0 };
    let pad_partials = 4 * floats(train_tables, table_elements(p)).next_multiple_of(4);
    [pad_partials, pad_partials + 4 * floats(train_pad, 3 * p.channels())]
}

/// Scratch memory of [`backward`]; `trained` says whether the tables and the pad are.
pub fn workspace_bytes(problem: &AttentionProblem, trained: [bool; 2], gpu: &Gpu) -> usize {
    workspace(problem, trained, gpu)[1] as usize
}

/// Hopper launches of [`crate::launch::rel_pos_attention::backward`] for windows: one kernel, and the sums for the
/// tables and pad. None where the kernels do not cover the problem.
///
/// # Errors
/// On shapes that no grid covers.
pub fn backward(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    operands: &BackwardOperands,
    gpu: &Gpu,
) -> Result<Option<Vec<Launch>>> {
    let &Inputs { qkv, tables, pad } = inputs;
    let &BackwardOperands { out, lse, dout, dqkv, dtables, dpad, workspace: at } = operands;
    let addresses = [qkv, tables[0], tables[1], pad, out, dout, dqkv];
    let Some(tile) = pick(problem, dtype, &addresses) else { return Ok(None) };
    let [pad_partials, _] = workspace(problem, operands.trained(), gpu);
    let table_partials = if dtables == 0 { 0 } else { at };
    let pad_partials = if dpad == 0 { 0 } else { at + pad_partials };
    let (units, shape) = (units(problem) as u64, shape(problem));
    let params = RelPosAttentionWindowBwdParams {
        qkv,
        tables,
        pad,
        out,
        lse,
        dout,
        dqkv,
        table_partials,
        pad_partials,
        units,
        shape,
    };
    let parts = blocks(problem, gpu);
    let mut launches = vec![launch("bwd", problem, dtype, (parts, tile.backward_bytes), &params)?];
    let mut sum = |partials: device_ptr, out: device_ptr, size: usize| -> Result<()> {
        if out != 0 {
            launches.push(sum_partials::launch(dtype, partials, out, parts, size as u64)?);
        }
        Ok(())
    };
    sum(table_partials, dtables, table_elements(problem))?;
    sum(pad_partials, dpad, 3 * problem.channels())?;
    Ok(Some(launches))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::rel_pos_attention::portable::tests::GLOBAL;

    /// SAM's ViT-B.
    const WINDOWED: AttentionProblem =
        AttentionProblem { batch: 1, side_h: 14, side_w: 14, ..GLOBAL };
    const INPUTS: Inputs = Inputs { qkv: 64, tables: [128, 256], pad: 192 };

    #[test]
    fn blocks_take_turns_at_heads_of_windows() -> Result<()> {
        let of = |problem| forward(&problem, DType::BF16, &INPUTS, [16, 4], &Gpu::H100);
        let launch = of(WINDOWED)?.unwrap();
        assert_eq!(launch.kernel, "rel_pos_attention_window_fwd_sm90_hd64_bf16");
        assert_eq!((launch.grid, launch.block), ([132, 1, 1], [448, 1, 1]));
        let small = AttentionProblem { h: 14, w: 14, ..WINDOWED };
        assert_eq!(of(small)?.unwrap().grid, [12, 1, 1]);
        // As many as the device has multiprocessors, not as an H100 has.
        let gpu = Gpu { multiprocessors: 78, ..Gpu::H100 };
        let launch = forward(&WINDOWED, DType::BF16, &INPUTS, [16, 4], &gpu)?.unwrap();
        assert_eq!(launch.grid, [78, 1, 1]);
        Ok(())
    }

    #[test]
    fn the_backward_is_one_kernel_and_the_sums_of_what_is_trained() -> Result<()> {
        let launches = |dtables, dpad| -> Result<Vec<String>> {
            let [out, lse, dout, dqkv, workspace] = [16, 4, 32, 48, 1024];
            let operands = BackwardOperands { out, lse, dout, dqkv, dtables, dpad, workspace };
            let launches =
                backward(&WINDOWED, DType::F16, &INPUTS, &operands, &Gpu::H100)?.unwrap();
            Ok(launches.into_iter().map(|launch| launch.kernel).collect())
        };
        let kernel = "rel_pos_attention_window_bwd_sm90_hd64_f16";
        assert_eq!(launches(0, 0)?, [kernel]);
        assert_eq!(launches(512, 768)?, [kernel, "sum_partials_f16", "sum_partials_f16"]);
        assert_eq!(workspace_bytes(&WINDOWED, [false; 2], &Gpu::H100), 0);
        let bytes = workspace_bytes(&WINDOWED, [true; 2], &Gpu::H100);
        assert_eq!(bytes, 132 * 4 * (54 * 64 + 3 * 768));
        Ok(())
    }

    #[test]
    fn the_rest_is_other_kernels() -> Result<()> {
        let covered = |problem, dtype| {
            let launch = forward(&problem, dtype, &INPUTS, [16, 4], &Gpu::H100)?;
            Ok::<_, candle_core::Error>(launch.is_some())
        };
        assert!(covered(WINDOWED, DType::F16)?);
        assert!(!covered(WINDOWED, DType::F32)?);
        assert!(!covered(AttentionProblem { side_w: 15, ..WINDOWED }, DType::F16)?);
        assert!(!covered(AttentionProblem { head_dim: 32, ..WINDOWED }, DType::F16)?);
        let unaligned = Inputs { pad: 200, ..INPUTS };
        assert!(forward(&WINDOWED, DType::F16, &unaligned, [16, 4], &Gpu::H100)?.is_none());
        Ok(())
    }
}
