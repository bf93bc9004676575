//! Matrix views over slices, and their product through the `gemm` crate's micro-kernels.

use gemm::Parallelism;

/// A matrix over a slice, any strides.
#[derive(Clone, Copy)]
pub struct Mat<'a> {
    data: &'a [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
    col_stride: usize,
}

impl<'a> Mat<'a> {
    /// Row-major, rows `row_stride` apart.
    pub fn new(data: &'a [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride, col_stride: 1 }
    }

    /// Row-major without gaps.
    pub fn packed(data: &'a [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }

    /// The transpose.
    pub fn t(self) -> Self {
        Self {
            rows: self.cols,
            cols: self.rows,
            row_stride: self.col_stride,
            col_stride: self.row_stride,
            ..self
        }
    }
}

/// A row-major matrix over a mutable slice.
pub struct MatMut<'a> {
    data: &'a mut [f32],
    rows: usize,
    cols: usize,
    row_stride: usize,
}

impl<'a> MatMut<'a> {
    /// Rows `row_stride` apart.
    pub fn new(data: &'a mut [f32], rows: usize, cols: usize, row_stride: usize) -> Self {
        Self { data, rows, cols, row_stride }
    }

    /// Without gaps.
    pub fn packed(data: &'a mut [f32], rows: usize, cols: usize) -> Self {
        Self::new(data, rows, cols, cols)
    }
}

/// What happens to the destination's old values.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Into {
    /// They are replaced.
    Store,
    /// The product is added to them.
    Add,
}

/// `dst = scale * lhs * rhs`, or `dst += ..`, on this thread alone.
pub fn gemm(dst: MatMut<'_>, into: Into, scale: f32, lhs: Mat<'_>, rhs: Mat<'_>) {
    run(dst, into, scale, lhs, rhs, Parallelism::None)
}

/// [`gemm`] on all of rayon's threads.
pub fn gemm_parallel(dst: MatMut<'_>, into: Into, scale: f32, lhs: Mat<'_>, rhs: Mat<'_>) {
    run(dst, into, scale, lhs, rhs, Parallelism::Rayon(0))
}

/// One past the last element a matrix touches.
fn extent(rows: usize, cols: usize, row_stride: usize, col_stride: usize) -> usize {
    if rows == 0 || cols == 0 {
        0
    } else {
        (rows - 1) * row_stride + (cols - 1) * col_stride + 1
    }
}

fn run(
    dst: MatMut<'_>,
    into: Into,
    scale: f32,
    lhs: Mat<'_>,
    rhs: Mat<'_>,
    parallelism: Parallelism,
) {
    let (m, n, k) = (dst.rows, dst.cols, lhs.cols);
    assert_eq!((lhs.rows, rhs.rows, rhs.cols), (m, k, n), "gemm: shapes disagree");
    assert!(dst.cols <= dst.row_stride || m <= 1, "gemm: rows of the destination overlap");
    assert!(extent(m, n, dst.row_stride, 1) <= dst.data.len(), "gemm: destination too short");
    for mat in [&lhs, &rhs] {
        let extent = extent(mat.rows, mat.cols, mat.row_stride, mat.col_stride);
        assert!(extent <= mat.data.len(), "gemm: operand too short");
    }
    // SAFETY: the asserts above hold every index the product reads or writes inside its slice, and the borrow
    // rules keep the destination apart from the operands.
    unsafe {
        gemm::gemm(
            m,
            n,
            k,
            dst.data.as_mut_ptr(),
            1,
            dst.row_stride as isize,
            into == Into::Add,
            lhs.data.as_ptr(),
            lhs.col_stride as isize,
            lhs.row_stride as isize,
            rhs.data.as_ptr(),
            rhs.col_stride as isize,
            rhs.row_stride as isize,
            1f32,
            scale,
            false,
            false,
            false,
            parallelism,
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn strided_transposed_and_accumulating() {
        let (m, n, k) = (5, 7, 3);
        let lhs: Vec<f32> = (0..m * (k + 2)).map(|i| (i % 11) as f32 - 5.0).collect();
        let rhs: Vec<f32> = (0..n * k).map(|i| (i % 7) as f32 - 3.0).collect();
        let mut dst = vec![1f32; m * (n + 1)];
        let lhs_mat = Mat::new(&lhs, m, k, k + 2);
        gemm(
            MatMut::new(&mut dst, m, n, n + 1),
            Into::Add,
            2.0,
            lhs_mat,
            Mat::packed(&rhs, n, k).t(),
        );
        for i in 0..m {
            for j in 0..n {
                let dot: f32 = (0..k).map(|c| lhs[i * (k + 2) + c] * rhs[j * k + c]).sum();
                assert_eq!(dst[i * (n + 1) + j], 1.0 + 2.0 * dot, "({i}, {j})");
            }
            assert_eq!(dst[i * (n + 1) + n], 1.0, "the gap after row {i} was written");
        }
    }
}
