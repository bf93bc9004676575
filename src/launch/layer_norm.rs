//! LayerNorm: `kernels/layer_norm/fwd.cuh`, `kernels/layer_norm/bwd.cuh`.

use super::bindings::{
    LayerNormBwdParams, LayerNormBwdWeightParams, LayerNormFwdParams, LAYER_NORM_COLUMN_ROWS,
    LAYER_NORM_COLUMN_SHARED_BYTES, LAYER_NORM_COLUMN_WARPS, LAYER_NORM_THREADS,
};
use super::cache::Plans;
use super::plan::Plan;
use super::slots::{input, output, present, WORKSPACE};
use super::{narrow, sum_partials, Launch, LayerNormProblem};
use candle_core::{DType, Result};
use std::sync::{Arc, LazyLock};

const OP: &str = LayerNormProblem::OP;
const WARP: u32 = 32;

/// A warp a row.
fn row_grid(problem: &LayerNormProblem) -> [u64; 3] {
    [(problem.rows as u64).div_ceil(u64::from(LAYER_NORM_THREADS / WARP)), 1, 1]
}

/// Blocks of rows whose sums of dweight and dbias are added last.
fn row_blocks(problem: &LayerNormProblem) -> u64 {
    (problem.rows as u64).div_ceil(u64::from(LAYER_NORM_COLUMN_ROWS))
}

/// A pass, and what it makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Inputs x, weight, bias; output y.
    Forward,
    /// Inputs x, weight, the gradient of y, that of a residual, which is added to dx. Outputs dx, and the gradients of
    /// weight and bias if they are trained.
    Backward {
        /// Whether weight and bias are.
        trained: bool,
        /// Whether there is a residual.
        residual: bool,
    },
}

/// The launches of a pass over operands of one dtype: one, or four in a backward with trained weight and bias.
///
/// # Errors
/// On other dtypes than f32, f16 and bf16, and on shapes that no grid covers.
pub fn plan(problem: &LayerNormProblem, pass: Pass, dtype: DType) -> Result<Arc<Plan>> {
    static PLANS: LazyLock<Plans<(LayerNormProblem, Pass, DType)>> = LazyLock::new(Plans::default);
    PLANS.get_or(&(*problem, pass, dtype), |_| match pass {
        Pass::Forward => forward(problem, dtype).map(Arc::new),
        Pass::Backward { trained, residual } => {
            backward(problem, dtype, [trained, residual]).map(Arc::new)
        }
    })
}

fn forward(problem: &LayerNormProblem, dtype: DType) -> Result<Plan> {
    let params = LayerNormFwdParams {
        x: input(0),
        weight: input(1),
        bias: input(2),
        y: output(0),
        rows: problem.rows as u64,
        size: narrow(OP, "the length of a row", problem.size)?,
        eps: problem.eps as f32,
    };
    let launch =
        Launch::new("layer_norm_fwd", dtype, row_grid(problem), LAYER_NORM_THREADS, &params)?;
    Ok(launch.into())
}

fn backward(
    problem: &LayerNormProblem,
    dtype: DType,
    [trained, residual]: [bool; 2],
) -> Result<Plan> {
    let (rows, size) = (problem.rows as u64, problem.size as u64);
    let [x, weight, dy] = [0, 1, 2].map(input);
    let params = LayerNormBwdParams {
        x,
        weight,
        dy,
        residual: present(residual, input(3)),
        dx: output(0),
        statistics: present(trained, WORKSPACE),
        rows,
        size: narrow(OP, "the length of a row", problem.size)?,
        eps: problem.eps as f32,
    };
    let rows_pass =
        Launch::new("layer_norm_bwd", dtype, row_grid(problem), LAYER_NORM_THREADS, &params)?;
    if !trained {
        return Ok(rows_pass.into());
    }
    // Statistics of the rows, then partial sums of both gradients.
    let parts = row_blocks(problem);
    let partials = [WORKSPACE + 4 * 3 * rows, WORKSPACE + 4 * (3 * rows + parts * size)];
    let statistics = WORKSPACE;
    let params = LayerNormBwdWeightParams { x, dy, statistics, partials: partials[0], rows, size };
    let grid = [parts, size.div_ceil(u64::from(WARP)), 1];
    let threads = LAYER_NORM_COLUMN_WARPS * WARP;
    let columns = Launch::new("layer_norm_bwd_weight", dtype, grid, threads, &params)?;
    let columns = Launch { shared_bytes: LAYER_NORM_COLUMN_SHARED_BYTES, ..columns };
    let sum = |of: usize| sum_partials::launch(dtype, partials[of], output(1 + of), parts, size);
    let steps = vec![rows_pass, columns, sum(0)?, sum(1)?];
    let workspace_bytes = 4 * (3 * rows + 2 * parts * size) as usize;
    Ok(Plan { steps, workspace_bytes, saved: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROBLEM: LayerNormProblem = LayerNormProblem { rows: 513, size: 70, eps: 1e-6 };

    #[test]
    fn every_row_has_a_warp() -> Result<()> {
        for rows in [1, 3, 4, 5, 4096] {
            let problem = LayerNormProblem { rows, ..PROBLEM };
            let launch = &plan(&problem, Pass::Forward, DType::F16)?.steps[0];
            assert_eq!(launch.kernel, "layer_norm_fwd_f16");
            let warps = launch.grid[0] * launch.block[0] / 32;
            assert!((rows..rows + 4).contains(&(warps as usize)), "{rows} rows, {warps} warps");
        }
        Ok(())
    }

    #[test]
    fn frozen_weights_cost_no_column_pass() -> Result<()> {
        let backward =
            |trained| plan(&PROBLEM, Pass::Backward { trained, residual: false }, DType::F32);
        let frozen = backward(false)?;
        assert_eq!((frozen.steps.len(), frozen.workspace_bytes), (1, 0));
        let Plan { steps: launches, workspace_bytes, .. } = &*backward(true)?;
        let names: Vec<&str> = launches.iter().map(|l| l.kernel.as_str()).collect();
        let sum = "sum_partials_f32";
        assert_eq!(names, ["layer_norm_bwd_f32", "layer_norm_bwd_weight_f32", sum, sum]);
        // Three blocks of rows, three tiles of 32 columns.
        assert_eq!(launches[1].grid, [3, 3, 1]);
        assert_eq!(*workspace_bytes, 4 * (3 * 513 + 2 * 3 * 70));
        Ok(())
    }
}
