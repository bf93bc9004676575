//! The neighbourhoods of a grid's positions as rows, which a convolution's weight multiplies.
//!
//! ```text
//! columns[i, j, (a, b)] = x[s i + a - half, s j + b - half], zero outside       a, b = 0 .. k
//! ```
//! The gradient adds up each position's places in f32, tap by tap. On the CPU and on a GPU with kernels each direction
//! is one pass.

use super::computed::{node, with_backward};
use super::custom::Stored;
#[cfg(feature = "cuda")]
use super::{custom::has_kernels, gpu::conv_columns as gpu};
use crate::cpu::conv_columns as cpu;
#[cfg(feature = "cuda")]
use crate::launch::conv_columns::covers;
use crate::problem::ConvColumns;
use candle_core::op::BackpropOp;
use candle_core::{bail, DType, Result, Storage, Tensor, D};
use half::bf16;

/// The k x k neighbourhood of every position, or of one in each s x s, zero outside:
/// `[B, H, W, C] -> [B, H / s, W / s, k k C]`, rounded up.
pub(crate) fn conv_columns(x: &Tensor, kernel: usize, stride: usize) -> Result<Tensor> {
    #[cfg(feature = "cuda")]
    if let Some(problem) = on_gpu(x, kernel, stride)? {
        let (storage, shape) = gpu::forward(&problem, x)?;
        let value = (candle_core::Storage::Cuda(storage), shape);
        return node(ConvColumns::OP, (x, None, None), value, move |_, _, grad| {
            Ok((gpu::backward(&problem, grad)?, None, None))
        });
    }
    if let Some(problem) = on_the_cpu(x, kernel, stride)? {
        return match x.dtype() {
            DType::BF16 => by_the_cpu::<bf16>(problem, x),
            _ => by_the_cpu::<f32>(problem, x),
        };
    }
    let value = neighbourhoods(&x.detach(), kernel, stride)?;
    with_backward(ConvColumns::OP, (x, None, None), value, move |[x, ..], grad| {
        let dx = scattered(grad, x.dims(), kernel, stride)?.to_dtype(x.dtype())?;
        Ok((Some(dx), None, None))
    })
}

/// The problem, if the CPU's code computes it.
fn on_the_cpu(x: &Tensor, kernel: usize, stride: usize) -> Result<Option<ConvColumns>> {
    let (batch, h, w, channels) = x.dims4()?;
    let problem = ConvColumns { batch, h, w, channels, kernel, stride };
    let is_float = matches!(x.dtype(), DType::F32 | DType::BF16 | DType::F16);
    let covered = x.device().is_cpu() && is_float && x.elem_count() * kernel * stride > 0;
    Ok(covered.then_some(problem))
}

fn by_the_cpu<T: Stored>(problem: ConvColumns, x: &Tensor) -> Result<Tensor> {
    const OP: &str = ConvColumns::OP;
    let columns = T::with(OP, x, |x| Ok(cpu::gather(&problem, &x)))?;
    let storage = Storage::Cpu(T::storage(OP, columns.into_vec(), x.dtype())?);
    let shape = (problem.batch, problem.rows(), problem.cols(), problem.width()).into();
    node(OP, (x, None, None), (storage, shape), move |[x, ..], _, grad| {
        let dx = T::with(OP, grad, |grad| Ok(cpu::scatter(&problem, &grad)))?;
        let storage = Storage::Cpu(T::storage(OP, dx.into_vec(), x.dtype())?);
        let dx = Tensor::from_storage(storage, x.shape(), BackpropOp::none(), false);
        Ok((Some(dx), None, None))
    })
}

/// The problem, if kernels of x's GPU compute it.
#[cfg(feature = "cuda")]
fn on_gpu(x: &Tensor, kernel: usize, stride: usize) -> Result<Option<ConvColumns>> {
    let (batch, h, w, channels) = x.dims4()?;
    let problem = ConvColumns { batch, h, w, channels, kernel, stride };
    Ok((has_kernels(x.device()) && covers(&problem, x.dtype())).then_some(problem))
}

/// The gradient of [`neighbourhoods`] for that of its value: every tap's part goes back to where it was read. In f32.
fn scattered(grad: &Tensor, dims: &[usize], kernel: usize, stride: usize) -> Result<Tensor> {
    let (channels, half) = (dims[3], kernel / 2);
    // Along an axis, output i read at s i + t - half for tap t.
    let along = |part: Tensor, axis: usize, tap: usize| -> Result<Tensor> {
        let (outputs, length) = (part.dim(axis)?, dims[axis]);
        let spread = match stride {
            1 => part,
            _ => {
                let lanes = part.unsqueeze(axis + 1)?.pad_with_zeros(axis + 1, 0, stride - 1)?;
                lanes.flatten(axis, axis + 1)?
            }
        };
        let (before, skipped) = (tap.saturating_sub(half), half.saturating_sub(tap));
        let read = (stride * outputs).saturating_sub(skipped).min(length.saturating_sub(before));
        if read == 0 {
            let mut dims = spread.dims().to_vec();
            dims[axis] = length;
            return Tensor::zeros(dims, spread.dtype(), spread.device());
        }
        spread.narrow(axis, skipped, read)?.pad_with_zeros(axis, before, length - before - read)
    };
    let mut sum: Option<Tensor> = None;
    for tap in 0..kernel * kernel {
        let part = grad.narrow(D::Minus1, tap * channels, channels)?.to_dtype(DType::F32)?;
        let part = along(along(part, 1, tap / kernel)?, 2, tap % kernel)?;
        sum = Some(match sum {
            Some(sum) => (sum + part)?,
            None => part,
        });
    }
    sum.map_or_else(|| bail!("conv2d: a kernel of 0"), Ok)
}

/// The k x k neighbourhood of every position, or of one in each s x s, zero outside:
/// `[B, H, W, C] -> [B, H / s, W / s, k k C]`, rounded up.
fn neighbourhoods(x: &Tensor, kernel: usize, stride: usize) -> Result<Tensor> {
    let (batch, h, w, channels) = x.dims4()?;
    let (rows, cols, half) = (h.div_ceil(stride), w.div_ceil(stride), kernel / 2);
    // Tap t of output i is the padded input at s i + t: lane t % s of block i + t / s.
    let blocks = |outputs: usize| outputs + (kernel - 1) / stride;
    let padded = x.pad_with_zeros(1, half, stride * blocks(rows) - h - half)?.pad_with_zeros(
        2,
        half,
        stride * blocks(cols) - w - half,
    )?;
    let lanes = (batch, blocks(rows), stride, blocks(cols), stride * channels);
    let padded = padded.reshape(lanes)?;
    let tap = |down: usize, right: usize| {
        padded
            .narrow(1, down / stride, rows)?
            .narrow(2, down % stride, 1)?
            .narrow(3, right / stride, cols)?
            .narrow(4, right % stride * channels, channels)?
            .squeeze(2)
    };
    // Written in place: a concatenation along the last axis would be a transposed one of the first, to be copied again.
    let width = kernel * kernel * channels;
    let columns = Tensor::zeros((batch, rows, cols, width), x.dtype(), x.device())?;
    for i in 0..kernel * kernel {
        columns.slice_set(&tap(i / kernel, i % kernel)?.contiguous()?, 3, i * channels)?;
    }
    Ok(columns)
}
