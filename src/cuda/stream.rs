//! The CUDA driver as a back end of [`crate::launch`]: memory and launches in the order of one stream.

use super::context::{self, Context};
use super::modules;
use super::tensor_map::encode;
use crate::launch::slots::Operands;
use crate::launch::{device_ptr, Backend, Launch};
use candle_core::cuda_backend::cudarc::driver::sys::{
    cuLaunchKernelEx, CUlaunchAttribute, CUlaunchAttributeID, CUlaunchAttributeValue,
    CUlaunchConfig, CUstreamCaptureStatus,
};
use candle_core::cuda_backend::cudarc::driver::{CudaSlice, CudaStream, DevicePtr};
use candle_core::{CudaDevice, Error, Result};
use std::sync::Arc;

/// Whether the device's stream is being captured; also if the driver does not say.
pub(crate) fn is_capturing(device: &CudaDevice) -> bool {
    let status = device.cuda_stream().capture_status();
    !status.is_ok_and(|s| s == CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
}

/// An attribute of a launch for the driver.
fn attribute(
    id: CUlaunchAttributeID,
    set: impl FnOnce(&mut CUlaunchAttributeValue),
) -> CUlaunchAttribute {
    let mut value = CUlaunchAttributeValue { pad: [0; 64] };
    set(&mut value);
    CUlaunchAttribute { id, pad: [0; 4], value }
}

/// The attributes of a launch besides its size: the first ones of these, as many as the number says.
fn attributes(launch: &Launch) -> ([CUlaunchAttribute; 2], u32) {
    let mut attributes = [attribute(CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_IGNORE, |_| ()); 2];
    let mut count = 0;
    if launch.begins_early {
        let id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        attributes[0] = attribute(id, |value| value.programmaticStreamSerializationAllowed = 1);
        count += 1;
    }
    if launch.cluster > 1 {
        let id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        attributes[count] = attribute(id, |value| {
            value.clusterDim.x = launch.cluster;
            value.clusterDim.y = 1;
            value.clusterDim.z = 1;
        });
        count += 1;
    }
    (attributes, count as u32)
}

/// The stream of a candle device, whose context is this thread's.
pub(super) struct Stream {
    pub stream: Arc<CudaStream>,
    known: &'static Context,
}

impl Stream {
    /// The device's stream. The device's context becomes this thread's.
    ///
    /// # Errors
    /// - the driver does not say what the device is.
    pub fn of(device: &CudaDevice) -> Result<Self> {
        let stream = device.cuda_stream();
        let known = context::of(stream.context())?;
        stream.context().bind_to_thread().map_err(Error::wrap)?;
        Ok(Self { stream, known })
    }
}

impl Backend for Stream {
    type Memory = CudaSlice<u8>;

    fn alloc(&self, bytes: usize) -> Result<Self::Memory> {
        // SAFETY: the kernels write it before they read it; the emulator, whose memory is NaN at first, shows that.
        unsafe { self.stream.alloc(bytes) }
            .map_err(|e| Error::wrap(e).context(format!("allocating {bytes} bytes on the GPU")))
    }

    fn address(&self, memory: &Self::Memory) -> device_ptr {
        // Allocated and used on this stream alone, so there is no event to record.
        memory.device_ptr(&self.stream).0
    }

    unsafe fn launch(&self, launch: &Launch, operands: &Operands<'_>) -> Result<()> {
        let Launch { kernel, grid, block, shared_bytes, cluster, .. } = launch;
        let failed = |e: Error| {
            e.context(format!(
                "launching {kernel} with {grid:?} blocks in clusters of {cluster}, {block:?} threads and {shared_bytes} bytes of \
                 shared memory a block"
            ))
        };
        let Context { gpu, kernels, maps, .. } = self.known;
        let kernel = modules::kernel(self.stream.context(), kernels, kernel).map_err(failed)?;
        kernel.permit_shared(*shared_bytes, gpu.shared_bytes).map_err(failed)?;
        let mut params = launch.fill(operands, |map| maps.get_or(map, encode)).map_err(failed)?;
        let (mut attributes, count) = attributes(launch);
        let config = CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block[0],
            blockDimY: block[1],
            blockDimZ: block[2],
            sharedMemBytes: *shared_bytes,
            hStream: self.stream.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: count,
        };
        let mut arguments = [params.as_mut_ptr().cast()];
        // SAFETY: the one argument is the params struct by value, which the driver copies before it returns. Host and
        // kernel have it from one header, with its size asserted on both sides. The attributes outlive the call. That
        // the addresses in the params stay valid is the caller's promise.
        unsafe {
            let function = kernel.function.cu_function();
            cuLaunchKernelEx(&config, function, arguments.as_mut_ptr(), std::ptr::null_mut())
                .result()
        }
        .map_err(|e| failed(Error::wrap(e)))
    }
}
