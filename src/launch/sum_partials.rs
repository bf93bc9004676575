//! The last step of a sum over rows: `kernels/sum_partials/sum_partials.cu`.

use super::bindings::{device_ptr, SumPartialsParams, SUM_PARTIALS_THREADS};
use super::Launch;
use candle_core::{DType, Result};

/// `out [size]` of `dtype` is the sum of `partials [parts, size]`, f32.
pub(super) fn launch(
    dtype: DType,
    partials: device_ptr,
    out: device_ptr,
    parts: u64,
    size: u64,
) -> Result<Launch> {
    let params = SumPartialsParams { partials, out, parts, size };
    let grid = [size.div_ceil(u64::from(SUM_PARTIALS_THREADS)), 1, 1];
    Launch::new("sum_partials", dtype, grid, SUM_PARTIALS_THREADS, &params)
}
