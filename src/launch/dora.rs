//! DoRA's row norms: `kernels/dora/norm.cuh`.

use super::bindings::{
    DoraNormParams, DORA_NORM_RANK, DORA_NORM_ROWS, DORA_NORM_SHARED_BYTES, DORA_NORM_THREADS,
};
use super::plan::Plan;
use super::slots::{input, output};
use super::Launch;
use candle_core::{bail, DType, Result};

/// Largest rank that the kernel takes.
pub const MOST_RANK: usize = DORA_NORM_RANK as usize;

/// The shapes and the factor of `|| W + scaling B A ||`.
#[derive(Clone, Copy, Debug)]
pub struct DoraNorm {
    /// Rows of W: width of the output.
    pub out_dim: usize,
    /// Columns of W: width of the input.
    pub in_dim: usize,
    /// Rows of A, at most 256.
    pub rank: usize,
    /// Factor of the low-rank part.
    pub scaling: f32,
}

/// Inputs weight of `dtype`, a, b in f32; output `[out_dim]` in f32.
///
/// # Errors
/// On other dtypes than f32, f16 and bf16, on ranks above 256, and on shapes that no grid covers.
pub fn plan(problem: &DoraNorm, dtype: DType) -> Result<Plan> {
    let &DoraNorm { out_dim, in_dim, rank, scaling } = problem;
    if rank > MOST_RANK || out_dim.max(in_dim) > u32::MAX as usize {
        bail!("dora_norm: the kernel takes ranks up to {DORA_NORM_RANK}, got {rank} of [{out_dim}, {in_dim}]")
    }
    let params = DoraNormParams {
        weight: input(0),
        a: input(1),
        b: input(2),
        norm: output(0),
        out_dim: out_dim as u32,
        in_dim: in_dim as u32,
        rank: rank as u32,
        scaling,
    };
    let grid = [(out_dim as u64).div_ceil(u64::from(DORA_NORM_ROWS)), 1, 1];
    let launch = Launch::new("dora_norm", dtype, grid, DORA_NORM_THREADS, &params)?;
    Ok(Launch { shared_bytes: DORA_NORM_SHARED_BYTES, ..launch }.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_row_has_a_block_and_high_ranks_are_refused() -> Result<()> {
        let problem = DoraNorm { out_dim: 17, in_dim: 5, rank: 256, scaling: 1.0 };
        let launch = &plan(&problem, DType::BF16)?.steps[0];
        assert_eq!((launch.kernel.as_str(), launch.grid), ("dora_norm_bf16", [3, 1, 1]));
        let message = plan(&DoraNorm { rank: 257, ..problem }, DType::F32).unwrap_err();
        assert!(message.to_string().contains("257"), "{message}");
        Ok(())
    }
}
