//! One operation on the GPU: addresses of its inputs, new outputs, scratch memory, launches.

use super::stream::Stream;
use crate::launch::{device_ptr, Backend, Launch};
use candle_core::backend::BackendDevice;
use candle_core::cuda_backend::cudarc::driver::{CudaStream, DevicePtr, DevicePtrMut, SyncOnDrop};
use candle_core::cuda_backend::{CudaStorage, CudaStorageSlice};
use candle_core::op::BackpropOp;
use candle_core::{bail, CudaDevice, DType, Error, Layout, Result, Shape, Storage, Tensor};

/// An operation's memory.
pub(crate) struct Job<'a, const OUTPUTS: usize> {
    /// Its name, for errors.
    pub op: &'static str,
    /// Where it runs.
    pub device: &'a CudaDevice,
    /// What it reads: contiguous f32, f16 or bf16 tensors, as [`operand`] makes them.
    pub inputs: &'a [(&'a CudaStorage, &'a Layout)],
    /// What it writes, entirely: new contiguous tensors.
    pub outputs: [(DType, Shape); OUTPUTS],
    /// Scratch memory; may be none.
    pub workspace_bytes: usize,
}

/// Where a job's memory lies.
pub(crate) struct Addresses<const OUTPUTS: usize> {
    inputs: Vec<device_ptr>,
    /// Of the outputs.
    pub outputs: [device_ptr; OUTPUTS],
    /// Of the scratch memory; 0 if there is none.
    pub workspace: device_ptr,
}

impl<const OUTPUTS: usize> Addresses<OUTPUTS> {
    /// Of the inputs' first elements, of which there are `N`.
    pub fn inputs<const N: usize>(&self) -> Result<[device_ptr; N]> {
        let (inputs, rest) = self.first_inputs()?;
        if !rest.is_empty() {
            bail!("{} inputs, expected {N}", self.inputs.len())
        }
        Ok(inputs)
    }

    /// Of the first `N` inputs, and of the others.
    pub fn first_inputs<const N: usize>(&self) -> Result<([device_ptr; N], &[device_ptr])> {
        match self.inputs.split_first_chunk() {
            Some((first, rest)) => Ok((*first, rest)),
            None => bail!("{} inputs, expected at least {N}", self.inputs.len()),
        }
    }
}

/// Runs what `plan` makes of the addresses, in order, on the device's stream; returns the outputs.
///
/// # Errors
/// On inputs that are not contiguous or not on this device, for want of memory, and if a launch fails; the message
/// names operation, shapes and kernel. What goes wrong while a kernel runs is reported by whoever waits for it.
pub(crate) fn run<const OUTPUTS: usize>(
    job: &Job<'_, OUTPUTS>,
    plan: impl FnOnce(&Addresses<OUTPUTS>) -> Result<Vec<Launch>>,
) -> Result<[CudaStorage; OUTPUTS]> {
    launch_all(job, plan).map_err(|e| {
        let shapes: Vec<_> = job.inputs.iter().map(|(_, layout)| layout.dims()).collect();
        e.context(format!("{} of {shapes:?} on the GPU", job.op))
    })
}

fn launch_all<const OUTPUTS: usize>(
    job: &Job<'_, OUTPUTS>,
    plan: impl FnOnce(&Addresses<OUTPUTS>) -> Result<Vec<Launch>>,
) -> Result<[CudaStorage; OUTPUTS]> {
    let stream = Stream(job.device.cuda_stream());
    // SAFETY: the kernels write every element of an output.
    let new = |(dtype, shape): &(DType, Shape)| unsafe { job.device.alloc_uninit(shape, *dtype) };
    let mut outputs = job.outputs.iter().map(new).collect::<Result<Vec<_>>>()?;
    let workspace =
        (job.workspace_bytes > 0).then(|| stream.alloc(job.workspace_bytes)).transpose()?;
    {
        // The guards tell other streams when the memory is ready; they do so when dropped, after the launches.
        let read = |&(storage, layout): &(_, _)| read(storage, layout, &stream.0);
        let inputs = job.inputs.iter().map(read).collect::<Result<Vec<_>>>()?;
        let write = |storage| write(storage, &stream.0);
        let written = outputs.iter_mut().map(write).collect::<Result<Vec<_>>>()?;
        let addresses = Addresses {
            inputs: inputs.iter().map(|(address, _)| *address).collect(),
            outputs: std::array::from_fn(|i| written[i].0),
            workspace: workspace.as_ref().map_or(0, |memory| stream.address(memory)),
        };
        for launch in plan(&addresses)? {
            // SAFETY: the addresses are those of this job's memory, as long as the shapes from which
            // crate::launch made the params say. It is freed in the stream's order, after the kernels.
            unsafe { stream.launch(&launch)? };
        }
    }
    outputs.try_into().map_err(|_| Error::msg("an output is missing"))
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
    Ok((address + (start * size) as u64, guard))
}

fn write<'a>(
    storage: &'a mut CudaStorage,
    stream: &'a CudaStream,
) -> Result<(device_ptr, SyncOnDrop<'a>)> {
    Ok(address!(&mut storage.slice, device_ptr_mut, stream))
}

/// The tensor as kernels take it: contiguous, and aligned to their widest accesses.
pub(crate) fn operand(tensor: &Tensor) -> Result<Tensor> {
    const ALIGNMENT: usize = 16;
    let offset = tensor.layout().start_offset() * tensor.dtype().size_in_bytes();
    match offset % ALIGNMENT {
        0 => tensor.contiguous(),
        _ => tensor.force_contiguous(),
    }
}

/// Runs a job whose inputs and outputs are tensors, as a backward's are.
///
/// # Errors
/// As [`run`].
pub(crate) fn with_tensors<const OUTPUTS: usize>(
    op: &'static str,
    inputs: &[&Tensor],
    outputs: [(DType, &Shape); OUTPUTS],
    workspace_bytes: usize,
    plan: impl FnOnce(&Addresses<OUTPUTS>) -> Result<Vec<Launch>>,
) -> Result<[Tensor; OUTPUTS]> {
    let Some(first) = inputs.first() else { bail!("{op}: no inputs") };
    let device = first.device().as_cuda_device()?;
    let inputs = inputs.iter().map(|t| operand(t)).collect::<Result<Vec<_>>>()?;
    let guards: Vec<_> = inputs.iter().map(Tensor::storage_and_layout).collect();
    let storages = guards
        .iter()
        .map(|(storage, layout)| match &**storage {
            Storage::Cuda(storage) => Ok((storage, *layout)),
            _ => bail!("{op}: expected a tensor on the GPU"),
        })
        .collect::<Result<Vec<_>>>()?;
    let typed = outputs.map(|(dtype, shape)| (dtype, shape.clone()));
    let job = Job { op, device, inputs: &storages, outputs: typed, workspace_bytes };
    let mut shapes = job.outputs.iter();
    Ok(run(&job, plan)?.map(|storage| {
        let shape = shapes.next().map_or_else(|| Shape::from(0), |(_, shape)| shape.clone());
        Tensor::from_storage(Storage::Cuda(storage), shape, BackpropOp::none(), false)
    }))
}
