//! Attention with relative positions: whose kernels compute a problem, forward and backward.

mod native;
pub(in crate::launch) mod portable;
pub mod sm90;
pub mod tile;
pub mod tiles;

pub use portable::*;

use super::cache::Plans;
use super::family::Family;
use super::plan::Plan;
use super::slots::{self, input, output, present, WORKSPACE};
use super::{device_ptr, Architecture, AttentionProblem, Gpu, Launch};
use candle_core::{bail, DType, Result};
use native::Native;
use std::sync::{Arc, LazyLock};

/// The native kernels of a GPU, if it may use any: one row an architecture.
fn native(gpu: &Gpu) -> Option<&'static Native> {
    Some(match gpu.native? {
        Architecture::Sm90 => &sm90::NATIVE,
    })
}

/// The native family that computes a problem; none inside if portable kernels do. None at all if no kernel covers the
/// problem: the composed graph computes it.
pub fn family(problem: &AttentionProblem, dtype: DType, gpu: &Gpu) -> Option<Option<Family>> {
    let fits = shared_bytes(problem, dtype)? <= gpu.shared_bytes;
    let own = || (native(gpu)?.family)(problem, dtype);
    (gpu.portable && fits).then(own)
}

/// A pass, and what it makes. Behind the inputs that are named here come the two tables, if they are read in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Inputs qkv, both tables in one, pad; outputs out, lse.
    Forward,
    /// Inputs qkv, both tables in one, pad, out, lse, the gradient of out; outputs dqkv, dtables, dpad.
    Backward {
        /// Whether the gradient of the tables is wanted.
        tables: bool,
        /// Whether that of the pad is.
        pad: bool,
    },
}

/// How the optional inputs come.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Given {
    /// Whether the tables, if there are any, are read in place, rather than in one.
    pub tables_in_place: bool,
    /// Whether there is a pad.
    pub pad: bool,
}

type Key = (AttentionProblem, Given, Pass, DType, Gpu);

/// The launches of a pass. A call has one dropout.
///
/// # Errors
/// - no kernel covers the problem;
/// - no grid covers its shapes.
pub fn plan(
    problem: &AttentionProblem,
    given: Given,
    pass: Pass,
    dtype: DType,
    gpu: &Gpu,
) -> Result<Arc<Plan>> {
    static PLANS: LazyLock<Plans<Key>> = LazyLock::new(Plans::default);
    let dropout = problem.dropout.map(|_| slots::dropout(0));
    let key = (AttentionProblem { dropout, ..*problem }, given, pass, dtype, *gpu);
    PLANS.get_or(&key, |key| make(key).map(Arc::new))
}

fn make(&(ref problem, given, pass, dtype, ref gpu): &Key) -> Result<Plan> {
    if family(problem, dtype, gpu).is_none() {
        bail!("{}: no kernel computes {problem:?} in {dtype:?}", AttentionProblem::OP)
    }
    let named = match pass {
        Pass::Forward => 3,
        Pass::Backward { .. } => 6,
    };
    let bytes_h = (problem.table_rows().0 * problem.head_dim * dtype.size_in_bytes()) as u64;
    let tables = match (problem.rel_pos, given.tables_in_place) {
        (false, _) => [0; 2],
        (true, false) => [input(1), input(1) + bytes_h],
        (true, true) => [input(named), input(named + 1)],
    };
    let inputs = &Inputs { qkv: input(0), tables, pad: present(given.pad, input(2)) };
    match pass {
        Pass::Forward => {
            let steps = forward_of(problem, dtype, inputs, [output(0), output(1)], gpu)?;
            Ok(Plan { steps, workspace_bytes: 0, saved: lse_elements(problem, dtype) })
        }
        Pass::Backward { tables, pad } => {
            let operands = BackwardOperands {
                out: input(3),
                lse: input(4),
                dout: input(5),
                dqkv: output(0),
                dtables: present(tables, output(1)),
                dpad: present(pad, output(2)),
                workspace: WORKSPACE,
            };
            backward_of(problem, dtype, inputs, &operands, gpu)
        }
    }
}

/// `out` and `lse`, by the GPU's own kernels if they take the operands.
pub(super) fn forward_of(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    [out, lse]: [device_ptr; 2],
    gpu: &Gpu,
) -> Result<Vec<Launch>> {
    let forward_by = |own: &Native| (own.forward)(problem, dtype, inputs, [out, lse], gpu);
    match native(gpu).map(forward_by).transpose()?.flatten() {
        Some(launches) => Ok(launches),
        None => Ok(vec![forward(problem, dtype, inputs, out, lse)?]),
    }
}

/// The gradients that are wanted, by the GPU's own kernels if they take the operands.
pub(super) fn backward_of(
    problem: &AttentionProblem,
    dtype: DType,
    inputs: &Inputs,
    operands: &BackwardOperands,
    gpu: &Gpu,
) -> Result<Plan> {
    let backward_by = |own: &Native| (own.backward)(problem, dtype, inputs, operands, gpu);
    if let Some(plan) = native(gpu).map(backward_by).transpose()?.flatten() {
        return Ok(plan);
    }
    let steps = backward(problem, dtype, inputs, operands, gpu)?;
    let workspace_bytes = workspace_bytes(problem, dtype, operands.trained(), gpu)?;
    Ok(Plan { steps, workspace_bytes, saved: 0 })
}

#[cfg(test)]
mod tests {
    use super::portable::tests::GLOBAL;
    use super::*;
    use crate::philox::Dropout;

    const WINDOWED: AttentionProblem = AttentionProblem { side_h: 14, side_w: 14, ..GLOBAL };
    const GIVEN: Given = Given { tables_in_place: true, pad: true };
    const FROZEN: Pass = Pass::Backward { tables: false, pad: false };

    /// Devices with portable kernels alone: the second has none of its own in the build.
    const OTHERS: [Gpu; 2] = [Gpu::A100, Gpu { native: None, ..Gpu::H100 }];

    /// The names of forward and backward's kernels, without what follows their family.
    fn names(problem: &AttentionProblem, gpu: &Gpu) -> Result<Vec<String>> {
        let steps =
            |pass| plan(problem, GIVEN, pass, DType::F16, gpu).map(|plan| plan.steps.clone());
        let launches = [steps(Pass::Forward)?, steps(FROZEN)?].concat();
        let family = |launch: Launch| launch.kernel.split("_hd").next().map(str::to_string);
        Ok(launches.into_iter().filter_map(family).collect())
    }

    #[test]
    fn a_problem_has_at_most_one_family() {
        let of = |problem, dtype| family(&problem, dtype, &Gpu::H100).flatten();
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
            assert_eq!(family(&GLOBAL, bf16, &gpu), Some(None));
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
        assert!(family(&GLOBAL, DType::BF16, &turing).is_none());
        let refused = plan(&GLOBAL, GIVEN, FROZEN, DType::BF16, &turing).unwrap_err().to_string();
        assert!(refused.contains("no kernel computes"), "{refused}");
        let wide = AttentionProblem { head_dim: 96, ..GLOBAL };
        let large = AttentionProblem { h: 400, w: 400, side_h: 400, side_w: 400, ..GLOBAL };
        for gpu in [Gpu::A100, Gpu::H100] {
            assert!(family(&GLOBAL, DType::BF16, &gpu).is_some());
            assert!(family(&wide, DType::BF16, &gpu).is_none());
            assert!(family(&large, DType::BF16, &gpu).is_none());
        }
        // An RTX 3090 or 4090: a block has less shared memory than an A100's.
        let consumer = Gpu { capability: (8, 9), shared_bytes: 99 << 10, ..Gpu::A100 };
        assert!(family(&GLOBAL, DType::F32, &Gpu::A100).is_some());
        assert!(family(&GLOBAL, DType::F32, &consumer).is_none());
        assert!(family(&GLOBAL, DType::BF16, &consumer).is_some());
    }

    #[test]
    fn a_problem_is_planned_once() -> Result<()> {
        let of =
            |problem: AttentionProblem, pass| plan(&problem, GIVEN, pass, DType::F16, &Gpu::A100);
        let with = |seed, stream| {
            let dropout = Some(Dropout { p: 0.1, seed, stream });
            of(AttentionProblem { dropout, ..WINDOWED }, FROZEN)
        };
        let first = with(1, 0)?;
        // Seeds of other steps, and streams of other layers.
        for (seed, stream) in [(1, 0), (2, 0), (1 << 40, 7)] {
            assert!(Arc::ptr_eq(&with(seed, stream)?, &first));
        }
        let scaled = AttentionProblem { softmax_scale: 1.0, ..WINDOWED };
        for other in [of(WINDOWED, FROZEN)?, of(WINDOWED, Pass::Forward)?, of(scaled, FROZEN)?] {
            assert!(!Arc::ptr_eq(&other, &first));
        }
        let key = (WINDOWED, GIVEN, FROZEN, DType::F16, Gpu::A100);
        assert_eq!(make(&key)?, *of(WINDOWED, FROZEN)?);
        Ok(())
    }

    #[test]
    fn blocks_and_workspace_follow_the_multiprocessors() -> Result<()> {
        for (gpu, tables, windows) in [
            (Gpu::H100, 132, 132),
            (Gpu { multiprocessors: 78, ..Gpu::H100 }, 78, 78),
            (Gpu { multiprocessors: 4, ..Gpu::H100 }, 4, 4),
            (Gpu::A100, 216, 216),
            (Gpu { multiprocessors: 132, ..Gpu::A100 }, 264, 264),
        ] {
            for (problem, blocks) in [(GLOBAL, tables), (WINDOWED, windows)] {
                let backward = |tables| {
                    let pass = Pass::Backward { tables, pad: false };
                    plan(&problem, GIVEN, pass, DType::BF16, &gpu)
                };
                let (frozen, trained) = (backward(false)?, backward(true)?);
                assert_eq!(trained.steps[0].grid, [blocks, 1, 1], "{gpu:?}");
                // A block's sums of the tables' gradients have room.
                let table = 4 * table_elements(&problem) * blocks as usize;
                assert!(trained.workspace_bytes >= frozen.workspace_bytes + table, "{gpu:?}");
            }
        }
        Ok(())
    }
}
