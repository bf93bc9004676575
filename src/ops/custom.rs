//! The computation behind an operation, and conversions between candle's storages and the f32 slices of [`crate::cpu`].

use crate::cpu::element::{self, Element};
#[cfg(feature = "cuda")]
use crate::launch::Gpu;
#[cfg(feature = "cuda")]
use candle_core::Device;
use candle_core::{bail, CpuStorage, DType, Layout, Result, Storage, Tensor};
use half::{bf16, f16};
use rayon::prelude::*;
use std::borrow::Cow;

/// The engine that computes an operation, forward and backward.
#[derive(Clone, Copy)]
pub(super) enum Engine {
    /// The code for the CPU.
    Cpu,
    /// Kernels: those that this GPU may use.
    #[cfg(feature = "cuda")]
    Gpu(Gpu),
    /// The composed graph of candle's operations.
    Composed,
}

/// Whether the device is a GPU with kernels.
#[cfg(feature = "cuda")]
pub(super) fn has_kernels(device: &Device) -> bool {
    matches!(device, Device::Cuda(device) if crate::driver::gpu(device).is_some())
}

/// The tensor as its device's code takes it: the CPU any strides, kernels contiguous and aligned ones.
#[cfg(any(test, feature = "cuda"))]
pub(super) fn operand(tensor: &Tensor) -> Result<Tensor> {
    match tensor.device() {
        #[cfg(feature = "cuda")]
        Device::Cuda(_) => crate::driver::operand(tensor),
        _ => Ok(tensor.clone()),
    }
}

/// The elements of a tensor in row-major order as f32; borrowed where they already are that.
pub(super) fn to_f32<'a>(
    op: &'static str,
    storage: &'a CpuStorage,
    layout: &Layout,
) -> Result<Cow<'a, [f32]>> {
    fn gather<T: Copy + Sync>(
        data: &[T],
        layout: &Layout,
        convert: impl Fn(T) -> f32 + Sync + Send,
    ) -> Vec<f32> {
        match layout.contiguous_offsets() {
            Some((start, end)) => converted(&data[start..end], convert),
            None => offsets(layout).map(|index| convert(data[index])).collect(),
        }
    }
    Ok(match storage {
        CpuStorage::F32(data) => match layout.contiguous_offsets() {
            Some((start, end)) => Cow::Borrowed(&data[start..end]),
            None => Cow::Owned(gather(data, layout, |x| x)),
        },
        CpuStorage::F16(data) => Cow::Owned(gather(data, layout, f16::to_f32)),
        CpuStorage::BF16(data) => Cow::Owned(match layout.contiguous_offsets() {
            Some((start, end)) => widened(&data[start..end]),
            None => gather(data, layout, bf16::to_f32),
        }),
        _ => bail!("{op}: tensors must be f32, f16 or bf16"),
    })
}

/// Elements that one task converts.
const CHUNK: usize = 1 << 14;

/// f32 from bf16, by all threads.
fn widened(data: &[bf16]) -> Vec<f32> {
    let mut values = vec![0f32; data.len()];
    let chunks = values.par_chunks_mut(CHUNK).zip(data.par_chunks(CHUNK));
    chunks.for_each(|(values, data)| element::widen(data, values));
    values
}

/// bf16 from f32, by all threads.
fn rounded(values: &[f32]) -> Vec<bf16> {
    let mut data = vec![bf16::ZERO; values.len()];
    let chunks = data.par_chunks_mut(CHUNK).zip(values.par_chunks(CHUNK));
    chunks.for_each(|(data, values)| element::round(values, data));
    data
}

/// By all threads.
fn converted<T: Copy + Sync, U: Send>(
    data: &[T],
    convert: impl Fn(T) -> U + Sync + Send,
) -> Vec<U> {
    data.par_iter().with_min_len(CHUNK).map(|&x| convert(x)).collect()
}

/// The offsets of a layout's elements in row-major order, for any strides.
fn offsets(layout: &Layout) -> impl Iterator<Item = usize> + '_ {
    let (dims, strides) = (layout.dims(), layout.stride());
    let mut index = vec![0usize; dims.len()];
    let mut offset = layout.start_offset();
    (0..layout.shape().elem_count()).map(move |_| {
        let current = offset;
        for axis in (0..dims.len()).rev() {
            index[axis] += 1;
            offset += strides[axis];
            if index[axis] < dims[axis] {
                break;
            }
            offset -= strides[axis] * dims[axis];
            index[axis] = 0;
        }
        current
    })
}

/// Rounds f32 values to `dtype`.
pub(super) fn from_f32(op: &'static str, values: Vec<f32>, dtype: DType) -> Result<CpuStorage> {
    Ok(match dtype {
        DType::F32 => CpuStorage::F32(values),
        DType::F16 => CpuStorage::F16(converted(&values, f16::from_f32)),
        DType::BF16 => CpuStorage::BF16(rounded(&values)),
        dtype => bail!("{op}: tensors must be f32, f16 or bf16, got {dtype:?}"),
    })
}

/// Calls `f` with the elements of a tensor on the CPU as f32.
pub(super) fn with_f32<R>(
    op: &'static str,
    tensor: &Tensor,
    f: impl FnOnce(Cow<'_, [f32]>) -> Result<R>,
) -> Result<R> {
    let (storage, layout) = tensor.storage_and_layout();
    match &*storage {
        Storage::Cpu(storage) => f(to_f32(op, storage, layout)?),
        _ => bail!("{op}: expected a tensor on the CPU, got {:?}", tensor.device().location()),
    }
}

/// An element of the CPU path as candle stores it.
pub(super) trait Stored: Element {
    /// Calls `f` with the elements of a tensor on the CPU, converted where they are of another type.
    fn with<R>(
        op: &'static str,
        tensor: &Tensor,
        f: impl FnOnce(Cow<'_, [Self]>) -> Result<R>,
    ) -> Result<R>;

    /// The values as `dtype`.
    fn storage(op: &'static str, values: Vec<Self>, dtype: DType) -> Result<CpuStorage>;
}

impl Stored for f32 {
    fn with<R>(
        op: &'static str,
        tensor: &Tensor,
        f: impl FnOnce(Cow<'_, [f32]>) -> Result<R>,
    ) -> Result<R> {
        with_f32(op, tensor, f)
    }

    fn storage(op: &'static str, values: Vec<f32>, dtype: DType) -> Result<CpuStorage> {
        from_f32(op, values, dtype)
    }
}

impl Stored for bf16 {
    fn with<R>(
        op: &'static str,
        tensor: &Tensor,
        f: impl FnOnce(Cow<'_, [bf16]>) -> Result<R>,
    ) -> Result<R> {
        let (storage, layout) = tensor.storage_and_layout();
        match (&*storage, layout.contiguous_offsets()) {
            (Storage::Cpu(CpuStorage::BF16(data)), Some((start, end))) => {
                f(Cow::Borrowed(&data[start..end]))
            }
            _ => with_f32(op, tensor, |values| f(Cow::Owned(rounded(&values)))),
        }
    }

    fn storage(op: &'static str, values: Vec<bf16>, dtype: DType) -> Result<CpuStorage> {
        match dtype {
            DType::BF16 => Ok(CpuStorage::BF16(values)),
            dtype => from_f32(op, widened(&values), dtype),
        }
    }
}

/// An owned f32 copy of a tensor on the CPU.
pub(super) fn vec_f32(op: &'static str, tensor: &Tensor) -> Result<Vec<f32>> {
    with_f32(op, tensor, |values| Ok(values.into_owned()))
}

/// A tensor shaped and typed like `like` with these values.
pub(super) fn tensor_like(values: Vec<f32>, like: &Tensor) -> Result<Tensor> {
    Tensor::from_vec(values, like.shape(), like.device())?.to_dtype(like.dtype())
}
