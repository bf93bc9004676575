//! The columns of a convolution and their gradient: `kernels/conv_columns/conv_columns.cu`.

use super::bindings::{ConvColumnsParams, CONV_COLUMNS_THREADS};
use super::plan::Plan;
use super::slots::{input, output};
use super::{dtype_name, narrow, ConvColumns, Launch};
use candle_core::{DType, Result};

const OP: &str = ConvColumns::OP;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pass {
    /// Input x, output its columns.
    Forward,
    /// Input the gradient of the columns, output that of x.
    Backward,
}

/// Whether there are kernels for this problem.
pub fn covers(problem: &ConvColumns, dtype: DType) -> bool {
    let most = (problem.rows() * problem.cols() * problem.width()).max(problem.h * problem.w);
    let elements = problem.batch.checked_mul(most);
    dtype_name(OP, dtype).is_ok() && elements.is_some_and(|n| n > 0 && u32::try_from(n).is_ok())
}

/// The one launch of a pass.
///
/// # Errors
/// On other dtypes than f32, f16 and bf16, and on shapes that no grid covers.
pub fn plan(problem: &ConvColumns, pass: Pass, dtype: DType) -> Result<Plan> {
    let &ConvColumns { batch, h, w, channels, kernel, stride } = problem;
    let size = |what, size| narrow(OP, what, size);
    let in_vector = 16 / dtype.size_in_bytes();
    let vectors = if channels % in_vector == 0 { channels / in_vector } else { channels };
    let (family, [x, columns], made) = match pass {
        Pass::Forward => (
            "conv_columns_fwd",
            [input(0), output(0)],
            problem.rows() * problem.cols() * kernel * kernel,
        ),
        Pass::Backward => ("conv_columns_bwd", [output(0), input(0)], h * w),
    };
    let params = ConvColumnsParams {
        x,
        columns,
        h: size("the number of rows", h)?,
        w: size("the number of columns", w)?,
        channels: size("the number of channels", channels)?,
        rows: size("the number of rows", problem.rows())?,
        cols: size("the number of columns", problem.cols())?,
        kernel: size("the kernel's side", kernel)?,
        stride: size("the stride", stride)?,
        vectors: size("the number of vectors", vectors)?,
        count: (batch * made * vectors) as u64,
    };
    let grid = [params.count.div_ceil(u64::from(CONV_COLUMNS_THREADS)), 1, 1];
    Ok(Launch::new(family, dtype, grid, CONV_COLUMNS_THREADS, &params)?.into())
}

#[cfg(test)]
mod tests {
    use super::*;

    const NECK: ConvColumns =
        ConvColumns { batch: 1, h: 64, w: 64, channels: 256, kernel: 3, stride: 1 };

    #[test]
    fn a_thread_makes_a_vector_of_channels() -> Result<()> {
        let blocks = |problem, pass| -> Result<u32> {
            Ok(plan(&problem, pass, DType::BF16)?.steps[0].grid[0])
        };
        assert_eq!(blocks(NECK, Pass::Forward)?, 4096 * 9 * 32 / 256);
        assert_eq!(blocks(NECK, Pass::Backward)?, 4096 * 32 / 256);
        let odd = ConvColumns { channels: 3, h: 5, w: 7, stride: 2, ..NECK };
        assert_eq!(blocks(odd, Pass::Forward)?, (3 * 4 * 9 * 3u32).div_ceil(256));
        Ok(())
    }

    #[test]
    fn more_than_a_thread_can_count_is_candles() {
        assert!(covers(&NECK, DType::F32) && !covers(&NECK, DType::F64));
        assert!(!covers(&ConvColumns { batch: 456, ..NECK }, DType::F32));
        assert!(!covers(&ConvColumns { batch: 0, ..NECK }, DType::F32));
    }
}
