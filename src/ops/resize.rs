//! Resizing of one dimension, as a product with a small constant matrix.
//!
//! ```text
//! linear   src(i) = max((i + 0.5) * L_in / L_out - 0.5, 0)
//!          y[i] = lerp(x[floor src], x[min(floor src + 1, L_in - 1)])
//! bicubic  w_ij ~ keys((j + 0.5 - (i + 0.5) * L_in / L_out) / max(L_in / L_out, 1)),  sum_j w_ij = 1
//!          y[i] = sum_j w_ij x[j]
//! ```
//! These are `torch.nn.functional.interpolate(align_corners=False)` with `mode="linear"`, and with `mode="bicubic",
//! antialias=True`, whose kernel is Keys' with a = -1/2, widened where the result is smaller. Being matrix products
//! they have their gradients for free, and two of them resize a plane.
//!
//! Source: Keys, "Cubic convolution interpolation for digital image processing", IEEE TASSP 1981;
//! `aten/src/ATen/native/cpu/UpSampleKernel.cpp`.

use candle_core::{bail, DType, Device, Result, Tensor};

/// Which two rows make row `i` of the resized, and the second one's weight; the first one's is the rest to 1.
fn linear_rows(len_in: usize, len_out: usize) -> Result<impl Iterator<Item = (usize, usize, f32)>> {
    if len_in == 0 || len_out == 0 {
        bail!("resize: lengths must be positive, got {len_in} -> {len_out}")
    }
    // torch computes the positions in f32; so does this, for equal weights.
    let ratio = len_in as f32 / len_out as f32;
    Ok((0..len_out).map(move |i| {
        let position = ((i as f32 + 0.5) * ratio - 0.5).max(0.0);
        let low = (position as usize).min(len_in - 1);
        (low, (low + 1).min(len_in - 1), position - low as f32)
    }))
}

/// The matrix `[len_out, len_in]` that resizes a vector of `len_in` to `len_out`, in f32.
///
/// [Example](crate::ops::resize_linear)
pub fn linear_resize_matrix(len_in: usize, len_out: usize, device: &Device) -> Result<Tensor> {
    let rows = linear_rows(len_in, len_out)?;
    let mut matrix = vec![0f32; len_in * len_out];
    for (row, (low, high, weight)) in matrix.chunks_mut(len_in).zip(rows) {
        row[low] += 1.0 - weight;
        row[high] += weight;
    }
    Tensor::from_vec(matrix, (len_out, len_in), device)
}

/// Resizes the rows of a table, `[len_in, d] -> [len_out, d]`; equal lengths give the table itself.
///
/// A row is made of two and no others: in a product with the matrix, one that is not finite would reach every row.
///
/// ```
/// use candle_core::{DType, Device, Tensor};
/// use candle_sam_lora::ops::{bicubic_resize_matrix, linear_resize_matrix, resize_bicubic, resize_linear};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let table = Tensor::new(&[[0f32], [2.0]], &Device::Cpu)?;
/// assert_eq!(resize_linear(&table, 4)?.to_vec2::<f32>()?, [[0.0], [0.5], [1.5], [2.0]]);
/// let matrix = linear_resize_matrix(2, 4, &Device::Cpu)?;
/// assert_eq!(matrix.matmul(&table)?.to_vec2::<f32>()?, [[0.0], [0.5], [1.5], [2.0]]);
/// let grid = Tensor::ones((1, 4, 4, 8), DType::F32, &Device::Cpu)?;
/// assert_eq!(resize_bicubic(&grid, 6)?.dims(), [1, 6, 6, 8]);
/// assert_eq!(bicubic_resize_matrix(4, 6, &Device::Cpu)?.dims(), [6, 4]);
/// # Ok(())
/// # }
/// ```
pub fn resize_linear(table: &Tensor, len_out: usize) -> Result<Tensor> {
    float("table", table)?;
    let (len_in, _) = table.dims2()?;
    if len_in == len_out {
        return Ok(table.clone());
    }
    let (mut low, mut high, mut weights) = (Vec::new(), Vec::new(), Vec::new());
    for (first, second, weight) in linear_rows(len_in, len_out)? {
        low.push(first as u32);
        high.push(second as u32);
        weights.push(weight);
    }
    let (device, rows) = (table.device(), table.to_dtype(DType::F32)?.contiguous()?);
    let rows_at = |at: Vec<u32>| rows.index_select(&Tensor::from_vec(at, len_out, device)?, 0);
    let weights = Tensor::from_vec(weights, (len_out, 1), device)?;
    let first = rows_at(low)?.broadcast_mul(&(1.0 - &weights)?)?;
    let second = rows_at(high)?.broadcast_mul(&weights)?;
    (first + second)?.to_dtype(table.dtype())
}

/// Keys' cubic kernel with a = -1/2; zero from 2 on.
fn keys(x: f64) -> f64 {
    match x.abs() {
        x if x < 1.0 => (1.5 * x - 2.5) * x * x + 1.0,
        x if x < 2.0 => ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0,
        _ => 0.0,
    }
}

/// The matrix `[len_out, len_in]` of the antialiased bicubic resizing of a vector, in f32.
///
/// [Example](crate::ops::resize_linear)
pub fn bicubic_resize_matrix(len_in: usize, len_out: usize, device: &Device) -> Result<Tensor> {
    if len_in == 0 || len_out == 0 {
        bail!("resize: lengths must be positive, got {len_in} -> {len_out}")
    }
    let ratio = len_in as f64 / len_out as f64;
    let stretch = ratio.max(1.0);
    let mut matrix = Vec::with_capacity(len_in * len_out);
    for i in 0..len_out {
        let centre = (i as f64 + 0.5) * ratio;
        let weight = |j: usize| keys((j as f64 + 0.5 - centre) / stretch);
        let sum: f64 = (0..len_in).map(weight).sum();
        matrix.extend((0..len_in).map(|j| (weight(j) / sum) as f32));
    }
    Tensor::from_vec(matrix, (len_out, len_in), device)
}

/// The matrix `[len_out, len_in]` of the cubic resizing of a vector without antialiasing, in f32. Beyond the ends, the
/// last element is repeated.
fn cubic_resize_matrix(len_in: usize, len_out: usize, device: &Device) -> Result<Tensor> {
    const A: f64 = -0.75;
    if len_in == 0 || len_out == 0 {
        bail!("resize: lengths must be positive, got {len_in} -> {len_out}")
    }
    let weight = |distance: f64| match distance {
        x if x <= 1.0 => ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0,
        x => ((A * x - 5.0 * A) * x + 8.0 * A) * x - 4.0 * A,
    };
    let mut matrix = vec![0f64; len_in * len_out];
    for (i, row) in matrix.chunks_mut(len_in).enumerate() {
        let centre = (i as f64 + 0.5) * len_in as f64 / len_out as f64 - 0.5;
        for tap in -1..=2 {
            let place = centre.floor() + f64::from(tap);
            let clamped = place.clamp(0.0, (len_in - 1) as f64) as usize;
            row[clamped] += weight((centre - place).abs());
        }
    }
    let matrix = matrix.into_iter().map(|weight| weight as f32).collect();
    Tensor::from_vec::<_, f32>(matrix, (len_out, len_in), device)
}

/// Resizes a grid of vectors bicubically, antialiased: `[1, H, W, C] -> [1, side, side, C]`, computed in f32. A grid of
/// that size is given back as it is.
///
/// [Example](crate::ops::resize_linear)
pub fn resize_bicubic(grid: &Tensor, side: usize) -> Result<Tensor> {
    resize_grids(grid, [side; 2], bicubic_resize_matrix)
}

/// Resizes grids of vectors bilinearly: `[B, H, W, C] -> [B, h, w, C]`, computed in f32. Grids of that size are given
/// back as they are.
///
/// [Example](crate::ops::resize_linear)
pub fn resize_bilinear(grids: &Tensor, size: [usize; 2]) -> Result<Tensor> {
    resize_grids(grids, size, linear_resize_matrix)
}

/// Resizes grids of vectors with Keys' kernel for a = -3/4, not antialiased, as
/// `torch.nn.functional.interpolate(mode="bicubic")` by default: `[B, H, W, C] -> [B, h, w, C]`, computed in f32. Grids
/// of that size are given back as they are.
pub(crate) fn resize_cubic(grids: &Tensor, size: [usize; 2]) -> Result<Tensor> {
    resize_grids(grids, size, cubic_resize_matrix)
}

/// Integers would be cut off, not rounded.
fn float(name: &str, tensor: &Tensor) -> Result<()> {
    match tensor.dtype() {
        DType::F64 => Ok(()),
        _ => super::check::float("resize", name, tensor),
    }
}

/// Resizes rows and columns of grids with the matrices of a kernel.
fn resize_grids(
    grids: &Tensor,
    [height, width]: [usize; 2],
    matrix: impl Fn(usize, usize, &Device) -> Result<Tensor>,
) -> Result<Tensor> {
    float("grids", grids)?;
    let (batch, h, w, channels) = grids.dims4()?;
    if [h, w] == [height, width] {
        return Ok(grids.clone());
    }
    let rows = matrix(h, height, grids.device())?;
    let columns = matrix(w, width, grids.device())?.broadcast_left(height)?.contiguous()?;
    let resized = |index: usize| {
        let x = grids.get(index)?.to_dtype(DType::F32)?.reshape((h, w * channels))?;
        columns.matmul(&rows.matmul(&x)?.reshape((height, w, channels))?)
    };
    let resized = (0..batch).map(resized).collect::<Result<Vec<_>>>()?;
    Tensor::stack(&resized, 0)?.to_dtype(grids.dtype())
}
