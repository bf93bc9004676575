//! LayerNorm: `kernels/layer_norm/fwd.cuh`, `kernels/layer_norm/bwd.cuh`.

use super::bindings::{
    device_ptr, LayerNormBwdParams, LayerNormBwdWeightParams, LayerNormFwdParams,
    LAYER_NORM_COLUMN_ROWS, LAYER_NORM_COLUMN_SHARED_BYTES, LAYER_NORM_COLUMN_WARPS,
    LAYER_NORM_THREADS,
};
use super::cache::Plans;
use super::plan::Plan;
use super::slots::{input, output, WORKSPACE};
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
    /// Inputs x, weight, the gradient of y; output dx, and, if they are trained, those of weight and bias.
    Backward {
        /// Whether weight and bias are.
        trained: bool,
    },
}

type Key = (LayerNormProblem, Pass, DType);

/// The launches of a pass over operands of one dtype.
///
/// # Errors
/// On other dtypes than f32, f16 and bf16, and on shapes that no grid covers.
pub fn plan(problem: &LayerNormProblem, pass: Pass, dtype: DType) -> Result<Arc<Plan>> {
    static PLANS: LazyLock<Plans<Key>> = LazyLock::new(Plans::default);
    PLANS.get_or(&(*problem, pass, dtype), make)
}

fn make(&(ref problem, pass, dtype): &Key) -> Result<Arc<Plan>> {
    let [x, weight, third] = [0, 1, 2].map(input);
    let [first, dweight, dbias] = [0, 1, 2].map(output);
    let steps = match pass {
        Pass::Forward => {
            let operands = ForwardOperands { x, weight, bias: third, y: first };
            vec![forward(problem, dtype, &operands)?]
        }
        Pass::Backward { trained } => {
            let trained =
                trained.then_some(TrainedOperands { dweight, dbias, workspace: WORKSPACE });
            let operands = BackwardOperands { x, weight, dy: third, dx: first, trained };
            backward(problem, dtype, &operands)?
        }
    };
    let workspace_bytes = match pass {
        Pass::Backward { trained: true } => workspace_bytes(problem),
        _ => 0,
    };
    Ok(Arc::new(Plan { steps, workspace_bytes, saved: 0 }))
}

/// The addresses of the forward's operands, all of one dtype.
#[derive(Clone, Copy, Debug)]
pub struct ForwardOperands {
    /// `[rows, size]`
    pub x: device_ptr,
    /// `[size]`
    pub weight: device_ptr,
    /// `[size]`
    pub bias: device_ptr,
    /// Output `[rows, size]`.
    pub y: device_ptr,
}

/// The forward.
///
/// # Errors
/// As [`plan`].
pub fn forward(
    problem: &LayerNormProblem,
    dtype: DType,
    operands: &ForwardOperands,
) -> Result<Launch> {
    let &ForwardOperands { x, weight, bias, y } = operands;
    let params = LayerNormFwdParams {
        x,
        weight,
        bias,
        y,
        rows: problem.rows as u64,
        size: narrow(OP, "the length of a row", problem.size)?,
        eps: problem.eps as f32,
    };
    Launch::new("layer_norm_fwd", dtype, row_grid(problem), LAYER_NORM_THREADS, &params)
}

/// The addresses of the backward's operands, all of one dtype.
#[derive(Clone, Copy, Debug)]
pub struct BackwardOperands {
    /// `[rows, size]`
    pub x: device_ptr,
    /// `[size]`
    pub weight: device_ptr,
    /// `[rows, size]`
    pub dy: device_ptr,
    /// Output `[rows, size]`.
    pub dx: device_ptr,
    /// Outputs `[size]`, if weight and bias are trained, and [`workspace_bytes`] of scratch memory.
    pub trained: Option<TrainedOperands>,
}

/// The addresses of what is wanted when weight and bias are trained.
#[derive(Clone, Copy, Debug)]
pub struct TrainedOperands {
    /// Output `[size]`.
    pub dweight: device_ptr,
    /// Output `[size]`.
    pub dbias: device_ptr,
    /// [`workspace_bytes`] bytes.
    pub workspace: device_ptr,
}

/// Scratch memory for the gradients of weight and bias: statistics of the rows, and partial sums.
pub fn workspace_bytes(problem: &LayerNormProblem) -> usize {
    4 * (3 * problem.rows + 2 * row_blocks(problem) as usize * problem.size)
}

/// The gradients: one launch if weight and bias are frozen, else four, in this order.
///
/// # Errors
/// As [`forward`].
pub fn backward(
    problem: &LayerNormProblem,
    dtype: DType,
    operands: &BackwardOperands,
) -> Result<Vec<Launch>> {
    let &BackwardOperands { x, weight, dy, dx, trained } = operands;
    let (rows, size) = (problem.rows as u64, problem.size as u64);
    let params = LayerNormBwdParams {
        x,
        weight,
        dy,
        dx,
        statistics: trained.map_or(0, |t| t.workspace),
        rows,
        size: narrow(OP, "the length of a row", problem.size)?,
        eps: problem.eps as f32,
    };
    let mut launches =
        vec![Launch::new("layer_norm_bwd", dtype, row_grid(problem), LAYER_NORM_THREADS, &params)?];
    if let Some(TrainedOperands { dweight, dbias, workspace }) = trained {
        let parts = row_blocks(problem);
        let partials = workspace + 4 * 3 * rows;
        let params =
            LayerNormBwdWeightParams { x, dy, statistics: workspace, partials, rows, size };
        let grid = [parts, size.div_ceil(u64::from(WARP)), 1];
        let threads = LAYER_NORM_COLUMN_WARPS * WARP;
        let columns = Launch::new("layer_norm_bwd_weight", dtype, grid, threads, &params)?;
        launches.push(Launch { shared_bytes: LAYER_NORM_COLUMN_SHARED_BYTES, ..columns });
        launches.push(sum_partials::launch(dtype, partials, dweight, parts, size)?);
        let partials = partials + 4 * parts * size;
        launches.push(sum_partials::launch(dtype, partials, dbias, parts, size)?);
    }
    Ok(launches)
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
        let frozen = BackwardOperands { x: 1, weight: 2, dy: 3, dx: 4, trained: None };
        assert_eq!(backward(&PROBLEM, DType::F32, &frozen)?.len(), 1);
        let trained = Some(TrainedOperands { dweight: 5, dbias: 6, workspace: 4096 });
        let launches = backward(&PROBLEM, DType::F32, &BackwardOperands { trained, ..frozen })?;
        let names: Vec<&str> = launches.iter().map(|l| l.kernel.as_str()).collect();
        let sum = "sum_partials_f32";
        assert_eq!(names, ["layer_norm_bwd_f32", "layer_norm_bwd_weight_f32", sum, sum]);
        // Three blocks of rows, three tiles of 32 columns.
        assert_eq!(launches[1].grid, [3, 3, 1]);
        assert_eq!(workspace_bytes(&PROBLEM), 4 * (3 * 513 + 2 * 3 * 70));
        Ok(())
    }
}
