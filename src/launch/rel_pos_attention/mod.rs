//! Attention with relative positions: whose kernels compute a problem, forward and backward.

mod native;
pub(in crate::launch) mod portable;
pub mod sm90;
pub mod tile;
pub mod tiles;

pub use portable::*;

use super::family::Family;
use super::{device_ptr, Architecture, AttentionProblem, Gpu, Launch};
use candle_core::{DType, Result};
use native::Native;

/// The native kernels of a GPU, if it may use any: one row an architecture.
fn native(gpu: &Gpu) -> Option<&'static Native> {
    Some(match gpu.native? {
        Architecture::Sm90 => &sm90::NATIVE,
    })
}

/// Attention by kernels: the problem, and the GPU with the kernels that may be used. A backward takes its forward's.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    problem: AttentionProblem,
    dtype: DType,
    gpu: Gpu,
}

/// The plan for a problem; none if no kernel of the GPU covers it, so that the composed graph computes it.
pub fn plan(problem: &AttentionProblem, dtype: DType, gpu: &Gpu) -> Option<Plan> {
    let fits = shared_bytes(problem, dtype)? <= gpu.shared_bytes;
    (gpu.portable && fits).then_some(Plan { problem: *problem, dtype, gpu: *gpu })
}

impl Plan {
    /// The native family that computes the problem, if one does.
    pub fn family(&self) -> Option<Family> {
        (native(&self.gpu)?.family)(&self.problem, self.dtype)
    }

    /// `out [batch, h, w, heads, head_dim]` and `lse` ([`lse_elements`]) of the inputs.
    ///
    /// # Errors
    /// On shapes that no grid covers, and addresses that are not multiples of 4.
    pub fn forward(
        &self,
        inputs: &Inputs,
        out: device_ptr,
        lse: device_ptr,
    ) -> Result<Vec<Launch>> {
        let Self { problem, dtype, gpu } = self;
        let forward_by = |own: &Native| (own.forward)(problem, *dtype, inputs, [out, lse], gpu);
        match native(gpu).map(forward_by).transpose()?.flatten() {
            Some(launches) => Ok(launches),
            None => Ok(vec![forward(problem, *dtype, inputs, out, lse)?]),
        }
    }

    /// The gradients, in launches to run in this order.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn backward(&self, inputs: &Inputs, operands: &BackwardOperands) -> Result<Vec<Launch>> {
        let Self { problem, dtype, gpu } = self;
        let backward_by = |own: &Native| (own.backward)(problem, *dtype, inputs, operands, gpu);
        match native(gpu).map(backward_by).transpose()?.flatten() {
            Some(launches) => Ok(launches),
            None => backward(problem, *dtype, inputs, operands, gpu),
        }
    }

    /// Scratch memory of the backward; `trained` says whether the tables and the pad are.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn workspace_bytes(&self, trained: [bool; 2]) -> Result<usize> {
        let Self { problem, dtype, gpu } = self;
        let own = native(gpu).map_or(0, |own| (own.workspace_bytes)(problem, *dtype, trained, gpu));
        // Which kernels run hangs on addresses that are not known yet.
        Ok(own.max(workspace_bytes(problem, *dtype, trained, gpu)?))
    }
}

#[cfg(test)]
mod tests {
    use super::portable::tests::GLOBAL;
    use super::*;

    const WINDOWED: AttentionProblem = AttentionProblem { side_h: 14, side_w: 14, ..GLOBAL };
    const INPUTS: Inputs = Inputs { qkv: 64, tables: [128, 256], pad: 192 };
    const OPERANDS: BackwardOperands = BackwardOperands {
        out: 16,
        lse: 4,
        dout: 32,
        dqkv: 48,
        dtables: 0,
        dpad: 0,
        workspace: 1 << 20,
    };
    /// Devices with portable kernels alone: the second has none of its own in the build.
    const OTHERS: [Gpu; 2] = [Gpu::A100, Gpu { native: None, ..Gpu::H100 }];

    /// The names of forward and backward's kernels, without what follows their family.
    fn names(problem: &AttentionProblem, gpu: &Gpu) -> Result<Vec<String>> {
        let plan = plan(problem, DType::F16, gpu).expect("kernels cover it");
        let launches = [plan.forward(&INPUTS, 16, 4)?, plan.backward(&INPUTS, &OPERANDS)?];
        let family = |launch: Launch| launch.kernel.split("_hd").next().map(str::to_string);
        Ok(launches.into_iter().flatten().filter_map(family).collect())
    }

    #[test]
    fn a_problem_has_at_most_one_family() {
        let of = |problem, dtype| plan(&problem, dtype, &Gpu::H100).and_then(|plan| plan.family());
        let bf16 = DType::BF16;
        assert_eq!(of(GLOBAL, bf16), Some(Family::GlobalAttention { head_dim: 64 }));
        assert_eq!(of(WINDOWED, bf16), Some(Family::WindowAttention { head_dim: 64 }));
        let huge = AttentionProblem { head_dim: 80, ..GLOBAL };
        assert_eq!(of(huge, DType::F16), Some(Family::GlobalAttention { head_dim: 80 }));
        // Windows that hang over the grid and are too large for the windows' kernels.
        assert_eq!(of(AttentionProblem { side_h: 15, side_w: 15, ..GLOBAL }, bf16), None);
        assert_eq!(of(AttentionProblem { head_dim: 32, ..GLOBAL }, bf16), None);
        assert_eq!(of(GLOBAL, DType::F32), None);
        for gpu in OTHERS {
            assert_eq!(plan(&GLOBAL, bf16, &gpu).and_then(|plan| plan.family()), None);
        }
    }

    #[test]
    fn forward_and_backward_are_of_one_implementation() -> Result<()> {
        let portable = ["fwd", "bwd_query", "bwd_key"].map(|s| format!("rel_pos_attention_{s}"));
        for (problem, own) in [
            (GLOBAL, &["fwd_sm90", "bwd_query_sm90", "bwd_key_sm90"][..]),
            (WINDOWED, &["window_fwd_sm90", "window_bwd_sm90"]),
        ] {
            let own: Vec<_> = own.iter().map(|s| format!("rel_pos_attention_{s}")).collect();
            assert_eq!(names(&problem, &Gpu::H100)?, own);
            for gpu in OTHERS {
                assert_eq!(names(&problem, &gpu)?, portable);
            }
        }
        Ok(())
    }

    #[test]
    fn a_problem_that_no_kernel_covers_is_the_composed_graphs() {
        let turing = Gpu { capability: (7, 5), ..Gpu::A100 }.with_kernels(&[80, 90]);
        assert!(plan(&GLOBAL, DType::BF16, &turing).is_none());
        let wide = AttentionProblem { head_dim: 96, ..GLOBAL };
        let large = AttentionProblem { h: 400, w: 400, side_h: 400, side_w: 400, ..GLOBAL };
        for gpu in [Gpu::A100, Gpu::H100] {
            assert!(plan(&GLOBAL, DType::BF16, &gpu).is_some());
            assert!(plan(&wide, DType::BF16, &gpu).is_none());
            assert!(plan(&large, DType::BF16, &gpu).is_none());
        }
        // An RTX 3090 or 4090: a block has less shared memory than an A100's.
        let consumer = Gpu { capability: (8, 9), shared_bytes: 99 << 10, ..Gpu::A100 };
        assert!(plan(&GLOBAL, DType::F32, &Gpu::A100).is_some());
        assert!(plan(&GLOBAL, DType::F32, &consumer).is_none());
        assert!(plan(&GLOBAL, DType::BF16, &consumer).is_some());
    }

    #[test]
    fn blocks_and_workspace_follow_the_multiprocessors() -> Result<()> {
        let trained = BackwardOperands { dtables: 512, ..OPERANDS };
        for (gpu, tables, windows) in [
            (Gpu::H100, 132, 132),
            (Gpu { multiprocessors: 78, ..Gpu::H100 }, 78, 78),
            (Gpu { multiprocessors: 4, ..Gpu::H100 }, 4, 4),
            (Gpu::A100, 216, 216),
            (Gpu { multiprocessors: 132, ..Gpu::A100 }, 264, 264),
        ] {
            for (problem, blocks) in [(GLOBAL, tables), (WINDOWED, windows)] {
                let plan = plan(&problem, DType::BF16, &gpu).expect("kernels cover it");
                let launches = plan.backward(&INPUTS, &trained)?;
                assert_eq!(launches[0].grid, [blocks, 1, 1], "{gpu:?}");
                // A block's sums of the tables' gradients have room.
                let table = 4 * table_elements(&problem) * blocks as usize;
                let bytes = |tables| plan.workspace_bytes([tables, false]);
                let own = plan.family() == Some(Family::WindowAttention { head_dim: 64 });
                let frozen = if own { 0 } else { bytes(false)? };
                assert!(bytes(true)? >= frozen + table, "{gpu:?}");
            }
        }
        Ok(())
    }
}
