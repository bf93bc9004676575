//! Linear resizing of one dimension, as a product with a small constant matrix.
//!
//! ```text
//! src(i) = max((i + 0.5) * L_in / L_out - 0.5, 0),  y[i] = lerp(x[floor src], x[min(floor src + 1, L_in - 1)])
//! ```
//! This is `torch.nn.functional.interpolate(mode="linear", align_corners=False)`; being a matrix product it has
//! its gradient for free, and two of them make the bilinear one.

use candle_core::{bail, DType, Device, Result, Tensor};

/// The matrix `[len_out, len_in]` that resizes a vector of `len_in` to `len_out`, in f32.
pub fn linear_resize_matrix(len_in: usize, len_out: usize, device: &Device) -> Result<Tensor> {
    if len_in == 0 || len_out == 0 {
        bail!("resize: lengths must be positive, got {len_in} -> {len_out}")
    }
    // torch computes the positions in f32; so does this, for equal weights.
    let ratio = len_in as f32 / len_out as f32;
    let mut matrix = vec![0f32; len_in * len_out];
    for (i, row) in matrix.chunks_mut(len_in).enumerate() {
        let position = ((i as f32 + 0.5) * ratio - 0.5).max(0.0);
        let low = (position as usize).min(len_in - 1);
        let high = (low + 1).min(len_in - 1);
        let weight = position - low as f32;
        row[low] += 1.0 - weight;
        row[high] += weight;
    }
    Tensor::from_vec(matrix, (len_out, len_in), device)
}

/// Resizes the rows of a table, `[len_in, d] -> [len_out, d]`; equal lengths give the table itself.
pub fn resize_linear(table: &Tensor, len_out: usize) -> Result<Tensor> {
    let (len_in, _) = table.dims2()?;
    if len_in == len_out {
        return Ok(table.clone());
    }
    let matrix = linear_resize_matrix(len_in, len_out, table.device())?;
    matrix.matmul(&table.to_dtype(DType::F32)?.contiguous()?)?.to_dtype(table.dtype())
}
