//! b of the adapters in three matrices of 16 bits, for products as exact as f32's: `kernels/low_rank/split.cuh`.

use crate::launch::bindings::{
    device_ptr, LowRankSplitParams, LowRankSplitPart, ProjectionPart, LOW_RANK_SPLIT_COLUMNS,
    LOW_RANK_SPLIT_RANK, LOW_RANK_SPLIT_SHARED_BYTES, LOW_RANK_SPLIT_THREADS,
};
use crate::launch::projection::Shapes;
use crate::launch::Launch;
use candle_core::{DType, Result};

/// What the powers of two take that the matrices are scaled by.
const UNSCALE_BYTES: u64 = 256;

/// The matrices that a launch makes.
pub(in crate::launch) struct Split {
    /// None if nothing is adapted.
    pub(in crate::launch) launch: Option<Launch>,
    /// The inverse scale of each projection's, f32.
    pub(in crate::launch) unscale: device_ptr,
    /// Each projection's `[out_dim, LOW_RANK_SPLIT_COLUMNS]`; 0 without LoRA.
    pub(in crate::launch) matrices: [device_ptr; 3],
}

/// Whether all ranks are small enough.
pub(in crate::launch) fn covers(shapes: &Shapes<'_>) -> bool {
    shapes.adapted().all(|(_, lora)| lora.rank <= LOW_RANK_SPLIT_RANK as usize)
}

fn matrix_bytes(out_dim: u32) -> u64 {
    (2 * u64::from(out_dim) * u64::from(LOW_RANK_SPLIT_COLUMNS)).next_multiple_of(256)
}

/// What [`launch`] wants to write to; 0 for what it does not cover.
pub(in crate::launch) fn bytes(shapes: &Shapes<'_>, dtype: DType) -> u64 {
    let outs = shapes.adapted().map(|(index, _)| shapes.problem.projections[index].out_dim as u32);
    match covers(shapes) && dtype.size_in_bytes() == 2 {
        true => UNSCALE_BYTES + outs.map(matrix_bytes).sum::<u64>(),
        false => 0,
    }
}

/// Splits b of the projections that have one into these [`bytes`].
pub(in crate::launch) fn launch(
    shapes: &Shapes<'_>,
    dtype: DType,
    parts: &[ProjectionPart; 3],
    to: device_ptr,
) -> Result<Split> {
    let mut params = LowRankSplitParams { unscale: to, ..Default::default() };
    let (mut matrices, mut end) = ([0; 3], to + UNSCALE_BYTES);
    for (index, _) in shapes.adapted() {
        let ProjectionPart { b, out_dim, rank, .. } = parts[index];
        matrices[index] = end;
        params.parts[index] = LowRankSplitPart { b, out: end, out_dim, rank };
        end += matrix_bytes(out_dim);
    }
    let launch = match shapes.adapted().last() {
        Some((last, _)) => {
            let grid = [last as u64 + 1, 1, 1];
            let launch =
                Launch::new("low_rank_split", dtype, grid, LOW_RANK_SPLIT_THREADS, &params)?;
            Some(Launch { shared_bytes: LOW_RANK_SPLIT_SHARED_BYTES, ..launch })
        }
        None => None,
    };
    Ok(Split { launch, unscale: to, matrices })
}
