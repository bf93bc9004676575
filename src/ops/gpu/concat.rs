//! Vectors in a row by their kernel.

use crate::driver::Job;
use crate::launch::concat::{plan, MOST};
use crate::ops::custom::has_kernels;
use candle_core::{DType, Result, Shape, Tensor};

/// The vectors one behind the other; none where candle has to do it, for a gradient too.
pub fn concat(vectors: &[Tensor]) -> Result<Option<Tensor>> {
    let [first, ..] = vectors else { return Ok(None) };
    let dtype = first.dtype();
    let takes = |vector: &Tensor| {
        vector.rank() == 1
            && vector.elem_count() > 0
            && vector.dtype() == dtype
            && vector.device().same_device(first.device())
            && !vector.track_op()
    };
    let floats = matches!(dtype, DType::F32 | DType::F16 | DType::BF16);
    let few = (2..=MOST).contains(&vectors.len());
    if !floats || !few || !has_kernels(first.device()) || !vectors.iter().all(takes) {
        return Ok(None);
    }
    let lengths: Vec<_> = vectors.iter().map(Tensor::elem_count).collect();
    let (plan, shape) = (plan(&lengths, dtype)?, Shape::from(lengths.iter().sum::<usize>()));
    let job = Job { op: "concat", plan: &plan, dropouts: &[] };
    let inputs: Vec<_> = vectors.iter().collect();
    let [out] = job.run_to_tensors(&inputs, [Some((dtype, &shape))])?;
    Ok(out)
}
