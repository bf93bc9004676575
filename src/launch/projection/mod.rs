//! Projections with LoRA: whose kernels compute a problem, forward and backward.

mod native;
mod portable;
mod portable_backward;
pub mod sm90;
pub mod tile;
pub mod tiles;

pub use portable::*;
pub use portable_backward::{backward, backward_with, workspace_bytes, BackwardOperands};

use super::cache::Plans;
use super::family::Family;
use super::plan::Plan;
use super::slots::{self, input, output, present, WORKSPACE};
use super::{device_ptr, Architecture, Gpu, Launch};
use crate::problem::small_layout;
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
pub fn family(problem: &Problem<'_>, dtype: DType, gpu: &Gpu) -> Option<Option<Family>> {
    let own = || (native(gpu)?.family)(problem, dtype, gpu);
    (gpu.portable && covers(problem, dtype)).then(own)
}

/// A pass, and which of its optional operands there are. Behind the inputs that are named here come the weights, then
/// the parameters that are read in place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Inputs x, packed parameters, residual; outputs out, S, the sum before the activation.
    Forward {
        /// Whether there is a residual.
        residual: bool,
        /// Whether the sum is kept.
        sum: bool,
    },
    /// Inputs x, packed parameters, S, the sum, the gradient of out; outputs dx, those of the trained parameters,
    /// packed.
    Backward {
        /// Whether dx is wanted.
        dx: bool,
        /// Whether the gradients of the trained parameters are.
        parameters: bool,
    },
}

/// A small tensor of a plan.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Parameter {
    /// Whether it is one of the packed ones, in f32. Else kernels read it in place.
    pub packed: bool,
    /// Whether it is of the problem's dtype, else f32, where it is read in place.
    pub typed: bool,
    /// Whether it has a gradient.
    pub trained: bool,
}

/// All that determines a plan.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Key {
    rows: usize,
    in_dim: usize,
    projections: Vec<ProjectionProblem>,
    activation: Activation,
    pass: Pass,
    parameters: Option<Vec<Parameter>>,
    dtype: DType,
    gpu: Gpu,
}

/// The launches of a pass, with `parameters` in the order of `problem::small_layout`; none if all are packed and
/// trained. A call has a dropout for each projection.
///
/// # Errors
/// - no kernel covers the problem;
/// - there are too few parameters, or the sum before an activation is absent.
pub fn plan(
    problem: &Problem<'_>,
    pass: Pass,
    parameters: Option<&[Parameter]>,
    dtype: DType,
    gpu: &Gpu,
) -> Result<Arc<Plan>> {
    static PLANS: LazyLock<Plans<Key>> = LazyLock::new(Plans::default);
    let &Problem { rows, in_dim, activation, .. } = problem;
    let parameters = parameters.map(<[Parameter]>::to_vec);
    let projections = with_dropout_slots(problem.projections);
    let key = Key { rows, in_dim, projections, activation, pass, parameters, dtype, gpu: *gpu };
    PLANS.get_or(&key, |key| key.plan().map(Arc::new))
}

/// The projections with slots for their dropouts.
fn with_dropout_slots(projections: &[ProjectionProblem]) -> Vec<ProjectionProblem> {
    let with_slot = |(index, part): (usize, &ProjectionProblem)| {
        let dropout = |lora: LoraProblem| lora.dropout.map(|_| slots::dropout(index));
        let lora = part.lora.map(|lora| LoraProblem { dropout: dropout(lora), ..lora });
        ProjectionProblem { lora, ..*part }
    };
    projections.iter().enumerate().map(with_slot).collect()
}

impl Key {
    fn plan(&self) -> Result<Plan> {
        let &Self { rows, in_dim, ref projections, activation, pass, dtype, ref gpu, .. } = self;
        let problem = &Problem { rows, in_dim, projections, activation };
        if !gpu.portable || !covers(problem, dtype) {
            bail!("projection: no kernel computes {problem:?} in {dtype:?}")
        }
        let named = match pass {
            Pass::Forward { .. } => 3,
            Pass::Backward { .. } => 5,
        };
        let mut others = (named..).map(input);
        let weights: Vec<_> = others.by_ref().take(projections.len()).collect();
        let separate = self.parameters.as_ref().map(|all| self.small_tensors(all, others));
        let (x, weights) = (input(0), &weights[..]);
        let small = separate.as_deref().map_or(Small::Flat(input(1)), Small::Separate);
        let saved = low_rank_len(problem);
        match pass {
            Pass::Forward { residual, sum } => {
                let residual = present(residual, input(2));
                let [out, low_rank, kept] = [0, 1, 2].map(output);
                let (low_rank, sum) = (present(saved > 0, low_rank), present(sum, kept));
                let operands = ForwardOperands { x, weights, small, residual, out, low_rank, sum };
                let steps = forward_of(problem, dtype, &operands, gpu)?;
                Ok(Plan { steps, workspace_bytes: 0, saved })
            }
            Pass::Backward { dx, parameters } => {
                let workspace_bytes = workspace_bytes(problem, dtype);
                let operands = BackwardOperands {
                    x,
                    weights,
                    small,
                    low_rank: present(saved > 0, input(2)),
                    sum: present(activation != Activation::Identity, input(3)),
                    dout: input(4),
                    dx: present(dx, output(0)),
                    dsmall: present(parameters, output(1)),
                    workspace: present(workspace_bytes > 0, WORKSPACE),
                };
                let steps = backward_of(problem, dtype, &operands, gpu)?;
                Ok(Plan { steps, workspace_bytes, saved: 0 })
            }
        }
    }
}

impl Key {
    /// The packed parameters one after the other, those read in place in `own`.
    fn small_tensors(
        &self,
        parameters: &[Parameter],
        mut own: impl Iterator<Item = device_ptr>,
    ) -> Vec<SmallTensor> {
        let (layouts, _) = small_layout(self.in_dim, &self.projections);
        let lengths = layouts.iter().flat_map(SmallLayout::ranges).map(ExactSizeIterator::len);
        let mut packed = input(1);
        let small = |(&Parameter { packed: is_packed, typed, trained }, length): (_, usize)| {
            if !is_packed {
                return Some(SmallTensor { at: own.next()?, typed, trained });
            }
            let at = packed;
            packed += 4 * length as u64;
            Some(SmallTensor { at, typed: false, trained })
        };
        parameters.iter().zip(lengths).map_while(small).collect()
    }
}

/// S and the output, by the GPU's own kernels if they take the operands.
pub(super) fn forward_of(
    problem: &Problem<'_>,
    dtype: DType,
    operands: &ForwardOperands<'_>,
    gpu: &Gpu,
) -> Result<Vec<Launch>> {
    let forward_by = |own: &Native| (own.forward)(problem, dtype, operands, gpu);
    match native(gpu).map(forward_by).transpose()?.flatten() {
        Some(launches) => Ok(launches),
        None => forward(problem, dtype, operands, gpu),
    }
}

/// The gradients that are wanted, by the GPU's own kernels if they take the operands.
pub(super) fn backward_of(
    problem: &Problem<'_>,
    dtype: DType,
    operands: &BackwardOperands<'_>,
    gpu: &Gpu,
) -> Result<Vec<Launch>> {
    let backward_by = |own: &Native| (own.backward)(problem, dtype, operands, gpu);
    match native(gpu).map(backward_by).transpose()?.flatten() {
        Some(launches) => Ok(launches),
        None => backward(problem, dtype, operands, gpu),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::philox::Dropout;

    /// A layer of ViT-B with LoRA, over one image.
    const PARTS: [ProjectionProblem; 1] = [ProjectionProblem {
        out_dim: 768,
        bias: true,
        lora: Some(LoraProblem { rank: 16, scaling: 1.0, dropout: None, bias: false }),
    }];
    const LARGE: Problem<'_> =
        Problem { rows: 4096, in_dim: 768, projections: &PARTS, activation: Activation::Identity };

    const FORWARD: Pass = Pass::Forward { residual: false, sum: false };
    const BACKWARD: Pass = Pass::Backward { dx: true, parameters: false };

    fn of(problem: &Problem<'_>, gpu: &Gpu) -> Option<Family> {
        family(problem, DType::BF16, gpu).expect("kernels cover it")
    }

    /// Forward's and backward's launches.
    fn launches(problem: Problem<'_>, gpu: &Gpu) -> Result<Vec<Launch>> {
        let steps =
            |pass| plan(&problem, pass, None, DType::BF16, gpu).map(|plan| plan.steps.clone());
        Ok([steps(FORWARD)?, steps(BACKWARD)?].concat())
    }

    fn names(problem: Problem<'_>, gpu: &Gpu) -> Result<Vec<String>> {
        Ok(launches(problem, gpu)?.into_iter().map(|launch| launch.kernel).collect())
    }

    #[test]
    fn projections_are_native_where_a_tile_is_chosen() -> Result<()> {
        let family = |problem, dtype| family(&problem, dtype, &Gpu::H100).flatten();
        assert_eq!(family(LARGE, DType::BF16), Some(Family::Projection));
        assert_eq!(family(LARGE, DType::F32), None);
        assert_eq!(family(Problem { rows: 196, ..LARGE }, DType::BF16), None);
        assert_eq!(family(Problem { in_dim: 767, ..LARGE }, DType::BF16), None);
        let own = [
            "low_rank_input_64x16_bf16",
            "projection_fwd_sm90_pingpong_128x192_x2_bf16",
            "low_rank_grad_64x16_bf16",
            "projection_bwd_input_sm90_pingpong_128x192_x2_bf16",
        ];
        assert_eq!(names(LARGE, &Gpu::H100)?, own);
        let without_clusters = Gpu { clusters: false, ..Gpu::H100 };
        assert_eq!(names(LARGE, &without_clusters)?, own.map(|name| name.replace("_x2", "")));
        let portable =
            [own[0], "projection_fwd_128x128_bf16", own[2], "projection_bwd_input_128x128_bf16"];
        for gpu in [Gpu::A100, Gpu::H100.portable_only()] {
            assert_eq!(of(&LARGE, &gpu), None);
            assert_eq!(names(LARGE, &gpu)?, portable);
        }
        Ok(())
    }

    #[test]
    fn a_gpu_with_few_multiprocessors_is_filled_by_less() -> Result<()> {
        let small = Problem { rows: 256, ..LARGE };
        let four = Gpu { multiprocessors: 4, ..Gpu::H100 };
        assert_eq!(of(&small, &Gpu::H100), None);
        assert_eq!(of(&small, &four), Some(Family::Projection));
        // Two clusters of two blocks.
        assert_eq!(launches(small, &four)?[1].grid, [4, 1, 1]);
        let of = |gpu: Gpu| names(small, &gpu.portable_only()).map(|names| names[1].clone());
        assert_eq!(of(Gpu::H100)?, "projection_fwd_64x64_bf16");
        assert_eq!(of(four)?, "projection_fwd_128x128_bf16");
        Ok(())
    }

    #[test]
    fn kernels_begin_early_only_where_the_gpu_lets_them_forward_and_backward() -> Result<()> {
        let early = |gpu| -> Result<Vec<bool>> {
            Ok(launches(LARGE, &gpu)?.iter().map(|launch| launch.begins_early).collect())
        };
        assert_eq!(early(Gpu::H100)?, [false, true, false, true]);
        assert_eq!(early(Gpu::H100.in_turn())?, [false; 4]);
        Ok(())
    }

    #[test]
    fn a_problem_is_planned_once() -> Result<()> {
        let of = |dropout, scaling, pass| {
            let lora = LoraProblem { rank: 16, scaling, dropout, bias: false };
            let parts = [ProjectionProblem { lora: Some(lora), ..PARTS[0] }];
            let problem = Problem { projections: &parts, ..LARGE };
            plan(&problem, pass, None, DType::F16, &Gpu::A100)
        };
        let dropout = |seed, stream| Some(Dropout { p: 0.1, seed, stream });
        let first = of(dropout(1, 0), 1.0, FORWARD)?;
        // Seeds of other steps, and streams of other layers.
        for (seed, stream) in [(1, 0), (2, 0), (1 << 40, 7)] {
            assert!(Arc::ptr_eq(&of(dropout(seed, stream), 1.0, FORWARD)?, &first));
        }
        for other in [
            of(None, 1.0, FORWARD)?,
            of(dropout(1, 0), 2.0, FORWARD)?,
            of(dropout(1, 0), 1.0, BACKWARD)?,
        ] {
            assert!(!Arc::ptr_eq(&other, &first));
        }
        let Problem { rows, in_dim, activation, .. } = LARGE;
        let (pass, parameters, dtype, gpu) = (FORWARD, None, DType::F16, Gpu::A100);
        let projections = PARTS.to_vec();
        let key = Key { rows, in_dim, projections, activation, pass, parameters, dtype, gpu };
        assert_eq!(key.plan()?, *of(None, 1.0, FORWARD)?);
        Ok(())
    }

    #[test]
    fn what_no_kernel_takes_is_the_composed_graphs() {
        let turing = Gpu { capability: (7, 5), ..Gpu::A100 }.with_kernels(&[80, 90]);
        let silu = Problem { activation: Activation::Silu, ..LARGE };
        for (problem, dtype, gpu) in [
            (LARGE, DType::BF16, turing),
            (LARGE, DType::F64, Gpu::H100),
            (silu, DType::BF16, Gpu::H100),
        ] {
            assert!(family(&problem, dtype, &gpu).is_none());
            let refused = plan(&problem, FORWARD, None, dtype, &gpu).unwrap_err().to_string();
            assert!(refused.contains("no kernel computes"), "{refused}");
        }
    }
}
