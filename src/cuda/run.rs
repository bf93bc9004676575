//! One operation on the GPU: its inputs, new outputs and scratch memory fill the slots of its plan, whose launches run.

use super::replay;
use super::stream::Stream;
use crate::launch::plan::Plan;
use crate::launch::slots::Operands;
use crate::launch::{device_ptr, Backend};
use crate::philox::Dropout;
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{bail, DType, Error, Result, Shape, Storage, Tensor};

/// An operation's plan, and what else fills its slots in one call.
pub(crate) struct Job<'a> {
    /// The operation's name, for errors.
    pub op: &'static str,
    pub plan: &'a Plan,
    pub dropouts: &'a [Option<Dropout>],
}

/// Dtype and shape of an output; none where the plan does not write it.
pub(crate) type Output<'a> = Option<(DType, &'a Shape)>;

impl Job<'_> {
    /// [`run_some`](Self::run_some), with all outputs.
    ///
    /// # Errors
    /// As [`run_some`](Self::run_some).
    pub fn run<const OUTPUTS: usize>(
        &self,
        inputs: &[&Tensor],
        outputs: [(DType, &Shape); OUTPUTS],
    ) -> Result<[CudaStorage; OUTPUTS]> {
        let made: Option<Vec<_>> = self.run_some(inputs, outputs.map(Some))?.into_iter().collect();
        made.and_then(|made| made.try_into().ok()).ok_or_else(|| Error::msg("an output is missing"))
    }

    /// Launches the plan on the stream of the inputs' device; returns its outputs, new contiguous tensors that the
    /// kernels write entirely. Inputs are f32, f16 or bf16 tensors; [`operand`] makes those contiguous that are not.
    ///
    /// # Errors
    /// - inputs are not on one device;
    /// - the device has too little memory;
    /// - a launch fails.
    ///
    /// The message names operation, shapes and kernel. A failure while a kernel runs is reported by whoever waits for
    /// it.
    pub fn run_some<const OUTPUTS: usize>(
        &self,
        inputs: &[&Tensor],
        outputs: [Output<'_>; OUTPUTS],
    ) -> Result<[Option<CudaStorage>; OUTPUTS]> {
        self.launch_all(inputs, outputs).map_err(|e| {
            let shapes: Vec<_> = inputs.iter().map(|input| input.dims()).collect();
            e.context(format!("{} of {shapes:?} on the GPU", self.op))
        })
    }

    fn launch_all<const OUTPUTS: usize>(
        &self,
        inputs: &[&Tensor],
        outputs: [Output<'_>; OUTPUTS],
    ) -> Result<[Option<CudaStorage>; OUTPUTS]> {
        let Some(first) = inputs.first() else { bail!("no inputs") };
        let device = first.device().as_cuda_device()?;
        let stream = Stream::of(device)?;
        with_operands(inputs, &stream.stream, |inputs| {
            let mut made = [const { None }; OUTPUTS];
            for (made, output) in made.iter_mut().zip(outputs) {
                if let Some((dtype, shape)) = output {
                    // SAFETY: the kernels write every element of an output.
                    *made = Some(unsafe { device.alloc_uninit(shape, dtype)? });
                }
            }
            let bytes = self.plan.workspace_bytes;
            let workspace = (bytes > 0).then(|| stream.alloc(bytes)).transpose()?;
            {
                // The guards tell other streams when the memory is ready; they do so when dropped, after the launches.
                let mut guards = [const { None }; OUTPUTS];
                let mut addresses = [0; OUTPUTS]; // null where there is none
                for (index, storage) in made.iter_mut().enumerate() {
                    if let Some(storage) = storage {
                        let (address, guard) = write(storage, &stream.stream)?;
                        (addresses[index], guards[index]) = (address, Some(guard));
                    }
                }
                let operands = Operands {
                    inputs,
                    outputs: &addresses,
                    workspace: workspace.as_ref().map(|memory| stream.address(memory)),
                    dropouts: self.dropouts,
                    replayed: replay::seed(),
                };
                for step in &self.plan.steps {
                    // SAFETY: the addresses are those of this job's memory, as long as the shapes from which
                    // crate::launch made the params say. It is freed in the stream's order, after the kernels.
                    unsafe { stream.launch(step, &operands)? };
                }
            }
            Ok(made)
        })
    }

    /// As [`run_some`](Self::run_some), with outputs as tensors.
    ///
    /// # Errors
    /// As [`run_some`](Self::run_some).
    pub fn run_to_tensors<const OUTPUTS: usize>(
        &self,
        inputs: &[&Tensor],
        outputs: [Output<'_>; OUTPUTS],
    ) -> Result<[Option<Tensor>; OUTPUTS]> {
        let mut shapes = outputs.into_iter();
        Ok(self.run_some(inputs, outputs)?.map(|storage| {
            let (storage, (_, shape)) = storage.zip(shapes.next().flatten())?;
            Some(tensor(storage, shape))
        }))
    }
}

/// A tensor of a kernel's output.
pub(crate) fn tensor(storage: CudaStorage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
}

/// Calls `f` with the addresses of tensors that kernels read, in the order of the stream. Other streams may write the
/// tensors after that.
///
/// # Errors
/// - a tensor is not on the stream's GPU;
/// - `f` fails.
pub(super) fn with_operands<R>(
    tensors: &[&Tensor],
    stream: &CudaStream,
    f: impl FnOnce(&[device_ptr]) -> Result<R>,
) -> Result<R> {
    if !tensors.iter().all(|tensor| is_operand(tensor)) {
        let copies = tensors.iter().map(|tensor| operand(tensor)).collect::<Result<Vec<_>>>()?;
        return with_operands(&copies.iter().collect::<Vec<_>>(), stream, f);
    }
    let locks: Vec<_> = tensors.iter().map(|tensor| tensor.storage_and_layout()).collect();
    let (mut addresses, mut guards) =
        (Vec::with_capacity(locks.len()), Vec::with_capacity(locks.len()));
    for (storage, layout) in &locks {
        let Storage::Cuda(storage) = &**storage else { bail!("expected a tensor on the GPU") };
        let (address, guard) = read(storage, layout.start_offset(), stream)?;
        addresses.push(address);
        guards.push(guard);
    }
    f(&addresses)
}

/// The address of a storage's first element, and the guard to keep until its use is launched.
macro_rules! address {
    ($storage:expr, $method:ident, $stream:expr) => {
        match $storage {
            CudaStorageSlice::F32(slice) => slice.$method($stream),
            CudaStorageSlice::F16(slice) => slice.$method($stream),
            CudaStorageSlice::BF16(slice) => slice.$method($stream),
            _ => bail!("tensors must be f32, f16 or bf16"),
        }
    };
}

fn read<'a>(
    storage: &'a CudaStorage,
    start: usize,
    stream: &'a CudaStream,
) -> Result<(device_ptr, SyncOnDrop<'a>)> {
    let context = match &storage.slice {
        CudaStorageSlice::F32(slice) => slice.context(),
        CudaStorageSlice::F16(slice) => slice.context(),
        CudaStorageSlice::BF16(slice) => slice.context(),
        _ => bail!("tensors must be f32, f16 or bf16"),
    };
    if context.cu_ctx() != stream.context().cu_ctx() {
        bail!("a tensor is on another device")
    }
    let (address, guard) = address!(&storage.slice, device_ptr, stream);
    let size = match storage.slice {
        CudaStorageSlice::F32(_) => 4,
        _ => 2,
    };
    Ok((address + (start * size) as u64, guard))
}

pub(super) fn write<'a>(
    storage: &'a mut CudaStorage,
    stream: &'a CudaStream,
) -> Result<(device_ptr, SyncOnDrop<'a>)> {
    Ok(address!(&mut storage.slice, device_ptr_mut, stream))
}

/// The widest accesses of kernels, in bytes. Plans rely on it. The driver aligns memory to more.
const ALIGNMENT: usize = 16;

fn is_aligned(tensor: &Tensor) -> bool {
    let offset = tensor.layout().start_offset();
    offset == 0 || (offset * tensor.dtype().size_in_bytes()).is_multiple_of(ALIGNMENT)
}

/// Whether kernels take the tensor as it is.
fn is_operand(tensor: &Tensor) -> bool {
    tensor.is_contiguous() && is_aligned(tensor)
}

/// The tensor as kernels take it: contiguous, and aligned to their widest accesses.
pub(crate) fn operand(tensor: &Tensor) -> Result<Tensor> {
    match is_aligned(tensor) {
        true => tensor.contiguous(),
        false => tensor.force_contiguous(),
    }
}
