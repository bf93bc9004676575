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
use candle_core::{bail, DType, Error, Layout, Result, Shape, Storage, Tensor};

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
        inputs: &[(&CudaStorage, &Layout)],
        outputs: [(DType, &Shape); OUTPUTS],
    ) -> Result<[CudaStorage; OUTPUTS]> {
        let made: Option<Vec<_>> = self.run_some(inputs, outputs.map(Some))?.into_iter().collect();
        made.and_then(|made| made.try_into().ok()).ok_or_else(|| Error::msg("an output is missing"))
    }

    /// Launches the plan on the stream of the inputs' device; returns its outputs, new contiguous tensors that the kernels
    /// write entirely. Inputs are contiguous f32, f16 or bf16 tensors, as [`operand`] makes them.
    ///
    /// # Errors
    /// - inputs are not contiguous, not aligned or not on one device;
    /// - the device has too little memory;
    /// - a launch fails.
    ///
    /// The message names operation, shapes and kernel. A failure while a kernel runs is reported by whoever waits for
    /// it.
    pub fn run_some<const OUTPUTS: usize>(
        &self,
        inputs: &[(&CudaStorage, &Layout)],
        outputs: [Output<'_>; OUTPUTS],
    ) -> Result<[Option<CudaStorage>; OUTPUTS]> {
        self.launch_all(inputs, outputs).map_err(|e| {
            let shapes: Vec<_> = inputs.iter().map(|(_, layout)| layout.dims()).collect();
            e.context(format!("{} of {shapes:?} on the GPU", self.op))
        })
    }

    fn launch_all<const OUTPUTS: usize>(
        &self,
        inputs: &[(&CudaStorage, &Layout)],
        outputs: [Output<'_>; OUTPUTS],
    ) -> Result<[Option<CudaStorage>; OUTPUTS]> {
        let Some((first, _)) = inputs.first() else { bail!("no inputs") };
        let device = &first.device;
        let stream = Stream(device.cuda_stream());
        // SAFETY: the kernels write every element of an output.
        let new = |output: Output<'_>| {
            output.map(|(dtype, shape)| unsafe { device.alloc_uninit(shape, dtype) }).transpose()
        };
        let mut outputs = outputs.into_iter().map(new).collect::<Result<Vec<_>>>()?;
        let bytes = self.plan.workspace_bytes;
        let workspace = (bytes > 0).then(|| stream.alloc(bytes)).transpose()?;
        {
            // The guards tell other streams when the memory is ready; they do so when dropped, after the launches.
            let read = |&(storage, layout): &(_, _)| read(storage, layout, &stream.0);
            let inputs = inputs.iter().map(read).collect::<Result<Vec<_>>>()?;
            let inputs_at: Vec<_> = inputs.iter().map(|(address, _)| *address).collect();
            let mut written = Vec::with_capacity(OUTPUTS);
            let mut outputs_at = [0; OUTPUTS]; // null where there is none
            for (storage, at) in outputs.iter_mut().zip(&mut outputs_at) {
                if let Some(storage) = storage {
                    let (address, guard) = write(storage, &stream.0)?;
                    *at = address;
                    written.push(guard);
                }
            }
            let operands = Operands {
                inputs: &inputs_at,
                outputs: &outputs_at,
                workspace: workspace.as_ref().map(|memory| stream.address(memory)),
                dropouts: self.dropouts,
                replayed: replay::seed(),
            };
            for step in &self.plan.steps {
                // SAFETY: the addresses are those of this job's memory, as long as the shapes from which
                // crate::launch made the params say. It is freed in the stream's order, after the kernels.
                unsafe { stream.launch(&step.fill(&operands)?)? };
            }
        }
        outputs.try_into().map_err(|_| Error::msg("an output is missing"))
    }

    /// Runs a job whose inputs and outputs are tensors, as a backward's are.
    ///
    /// # Errors
    /// As [`run_some`](Self::run_some).
    pub fn run_on_tensors<const OUTPUTS: usize>(
        &self,
        inputs: &[&Tensor],
        outputs: [Output<'_>; OUTPUTS],
    ) -> Result<[Option<Tensor>; OUTPUTS]> {
        let inputs = inputs.iter().map(|t| operand(t)).collect::<Result<Vec<_>>>()?;
        let storages = with_storages(self.op, &inputs, |inputs| self.run_some(inputs, outputs))?;
        let mut shapes = outputs.into_iter();
        Ok(storages.map(|storage| {
            let (storage, (_, shape)) = storage.zip(shapes.next().flatten())?;
            Some(tensor(storage, shape))
        }))
    }
}

/// A tensor of a kernel's output.
pub(crate) fn tensor(storage: CudaStorage, shape: &Shape) -> Tensor {
    Tensor::from_storage(Storage::Cuda(storage), shape.clone(), BackpropOp::none(), false)
}

/// Calls `f` with the tensors' memory on the GPU.
///
/// # Errors
/// - a tensor is not on a GPU;
/// - `f` fails.
pub(crate) fn with_storages<R>(
    op: &'static str,
    tensors: &[Tensor],
    f: impl FnOnce(&[(&CudaStorage, &Layout)]) -> Result<R>,
) -> Result<R> {
    let guards: Vec<_> = tensors.iter().map(Tensor::storage_and_layout).collect();
    let storages = guards.iter().map(|(storage, layout)| match &**storage {
        Storage::Cuda(storage) => Ok((storage, *layout)),
        _ => bail!("{op}: expected a tensor on the GPU"),
    });
    f(&storages.collect::<Result<Vec<_>>>()?)
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

pub(super) fn read<'a>(
    storage: &'a CudaStorage,
    layout: &Layout,
    stream: &'a CudaStream,
) -> Result<(device_ptr, SyncOnDrop<'a>)> {
    if storage.device.cuda_stream().context().cu_ctx() != stream.context().cu_ctx() {
        bail!("a tensor is on another device")
    }
    let Some((start, _)) = layout.contiguous_offsets() else {
        bail!("expected a contiguous tensor, got strides {:?}", layout.stride())
    };
    let (address, guard) = address!(&storage.slice, device_ptr, stream);
    let size = match storage.slice {
        CudaStorageSlice::F32(_) => 4,
        _ => 2,
    };
    let address = address + (start * size) as u64;
    if !address.is_multiple_of(ALIGNMENT as u64) {
        bail!("kernels read tensors from multiples of {ALIGNMENT} bytes, got {address:#x}")
    }
    Ok((address, guard))
}

pub(super) fn write<'a>(
    storage: &'a mut CudaStorage,
    stream: &'a CudaStream,
) -> Result<(device_ptr, SyncOnDrop<'a>)> {
    Ok(address!(&mut storage.slice, device_ptr_mut, stream))
}

/// The widest accesses of kernels, in bytes. Plans rely on it.
const ALIGNMENT: usize = 16;

/// The tensor as kernels take it: contiguous, and aligned to their widest accesses.
pub(crate) fn operand(tensor: &Tensor) -> Result<Tensor> {
    let offset = tensor.layout().start_offset() * tensor.dtype().size_in_bytes();
    match offset % ALIGNMENT {
        0 => tensor.contiguous(),
        _ => tensor.force_contiguous(),
    }
}
