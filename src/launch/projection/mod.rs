//! Projections with LoRA: whose kernels compute a problem, forward and backward.

mod native;
mod portable;
mod portable_backward;
pub mod sm90;
pub mod tile;
pub mod tiles;

pub use portable::*;
pub use portable_backward::{backward, backward_with, workspace_bytes, BackwardOperands};

use super::family::Family;
use super::{Architecture, Gpu, Launch};
use candle_core::{DType, Result};
use native::Native;

/// The native kernels of a GPU, if it may use any: one row an architecture.
fn native(gpu: &Gpu) -> Option<&'static Native> {
    Some(match gpu.native? {
        Architecture::Sm90 => &sm90::NATIVE,
    })
}

/// Projections by kernels: the problem, and the GPU with the kernels that may be used. A backward takes its forward's.
#[derive(Clone, Copy, Debug)]
pub struct Plan<'a> {
    problem: Problem<'a>,
    dtype: DType,
    gpu: Gpu,
}

/// The plan for a problem; none if no kernel of the GPU covers it, so that the composed graph computes it.
pub fn plan<'a>(problem: Problem<'a>, dtype: DType, gpu: &Gpu) -> Option<Plan<'a>> {
    (gpu.portable && covers(&problem, dtype)).then_some(Plan { problem, dtype, gpu: *gpu })
}

impl Plan<'_> {
    /// The native family that computes the problem, if one does.
    pub fn family(&self) -> Option<Family> {
        (native(&self.gpu)?.family)(&self.problem, self.dtype, &self.gpu)
    }

    /// S and the output, in launches to run in this order.
    ///
    /// # Errors
    /// If there are not as many weights and small tensors as the problem has.
    pub fn forward(&self, operands: &ForwardOperands<'_>) -> Result<Vec<Launch>> {
        let Self { problem, dtype, gpu } = self;
        let forward_by = |own: &Native| (own.forward)(problem, *dtype, operands, gpu);
        match native(gpu).map(forward_by).transpose()?.flatten() {
            Some(launches) => Ok(launches),
            None => forward(problem, *dtype, operands, gpu),
        }
    }

    /// The gradients that are wanted, in launches to run in this order.
    ///
    /// # Errors
    /// As [`forward`](Self::forward), and if the sum before an activation is absent.
    pub fn backward(&self, operands: &BackwardOperands<'_>) -> Result<Vec<Launch>> {
        let Self { problem, dtype, gpu } = self;
        let backward_by = |own: &Native| (own.backward)(problem, *dtype, operands, gpu);
        match native(gpu).map(backward_by).transpose()?.flatten() {
            Some(launches) => Ok(launches),
            None => backward(problem, *dtype, operands, gpu),
        }
    }

    /// Scratch memory of the backward, the same for all kernels.
    pub fn workspace_bytes(&self) -> usize {
        workspace_bytes(&self.problem, self.dtype)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const FORWARD: ForwardOperands<'_> = ForwardOperands {
        x: 256,
        weights: &[512],
        small: Small::Flat(1024),
        residual: 0,
        out: 2048,
        low_rank: 8192,
        sum: 0,
    };
    const BACKWARD: BackwardOperands<'_> = BackwardOperands {
        x: 256,
        weights: &[512],
        small: Small::Flat(1024),
        low_rank: 8192,
        sum: 0,
        dout: 2048,
        dx: 4096,
        dsmall: 0,
        workspace: 1 << 20,
    };
    /// A layer of ViT-B with LoRA, over one image.
    const PARTS: [ProjectionProblem; 1] = [ProjectionProblem {
        out_dim: 768,
        bias: true,
        lora: Some(LoraProblem { rank: 16, scaling: 1.0, dropout: None, bias: false }),
    }];
    const LARGE: Problem<'_> =
        Problem { rows: 4096, in_dim: 768, projections: &PARTS, activation: Activation::Identity };

    fn of<'a>(problem: Problem<'a>, gpu: &Gpu) -> Plan<'a> {
        plan(problem, DType::BF16, gpu).expect("kernels cover it")
    }

    /// Forward's and backward's launches.
    fn launches(problem: Problem<'_>, gpu: &Gpu) -> Result<Vec<Launch>> {
        let plan = of(problem, gpu);
        Ok([plan.forward(&FORWARD)?, plan.backward(&BACKWARD)?].concat())
    }

    fn names(problem: Problem<'_>, gpu: &Gpu) -> Result<Vec<String>> {
        Ok(launches(problem, gpu)?.into_iter().map(|launch| launch.kernel).collect())
    }

    #[test]
    fn projections_are_native_where_a_tile_is_chosen() -> Result<()> {
        let family = |problem, dtype| plan(problem, dtype, &Gpu::H100).and_then(|p| p.family());
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
            assert_eq!(of(LARGE, &gpu).family(), None);
            assert_eq!(names(LARGE, &gpu)?, portable);
        }
        Ok(())
    }

    #[test]
    fn a_gpu_with_few_multiprocessors_is_filled_by_less() -> Result<()> {
        let small = Problem { rows: 256, ..LARGE };
        let four = Gpu { multiprocessors: 4, ..Gpu::H100 };
        assert_eq!(of(small, &Gpu::H100).family(), None);
        assert_eq!(of(small, &four).family(), Some(Family::Projection));
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
    fn what_no_kernel_takes_is_the_composed_graphs() {
        let turing = Gpu { capability: (7, 5), ..Gpu::A100 }.with_kernels(&[80, 90]);
        assert!(plan(LARGE, DType::BF16, &turing).is_none());
        assert!(plan(LARGE, DType::F64, &Gpu::H100).is_none());
        assert!(plan(Problem { activation: Activation::Silu, ..LARGE }, DType::BF16, &Gpu::H100)
            .is_none());
    }
}
