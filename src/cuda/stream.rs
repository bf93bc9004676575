//! The CUDA driver as a back end of [`crate::launch`]: memory and launches in the order of one stream.

use super::tensor_map::encode;
use super::{context, modules};
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

/// Attributes of a launch for the driver, besides its size.
fn attributes(launch: &Launch) -> Vec<CUlaunchAttribute> {
    let mut attributes = Vec::new();
    let mut add = |id, set: &dyn Fn(&mut CUlaunchAttributeValue)| {
        let mut value = CUlaunchAttributeValue { pad: [0; 64] };
        set(&mut value);
        attributes.push(CUlaunchAttribute { id, pad: [0; 4], value });
    };
    if launch.begins_early {
        let id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
        add(id, &|value| value.programmaticStreamSerializationAllowed = 1);
    }
    if launch.cluster > 1 {
        let id = CUlaunchAttributeID::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION;
        add(id, &|value| {
            value.clusterDim.x = launch.cluster;
            value.clusterDim.y = 1;
            value.clusterDim.z = 1;
        });
    }
    attributes
}

/// The stream of a candle device.
pub(super) struct Stream(pub Arc<CudaStream>);

impl Backend for Stream {
    type Memory = CudaSlice<u8>;

    fn alloc(&self, bytes: usize) -> Result<Self::Memory> {
        // SAFETY: the kernels write it before they read it; the emulator, whose memory is NaN at first, shows that.
        unsafe { self.0.alloc(bytes) }
            .map_err(|e| Error::wrap(e).context(format!("allocating {bytes} bytes on the GPU")))
    }

    fn address(&self, memory: &Self::Memory) -> device_ptr {
        // Allocated and used on this stream alone, so there is no event to record.
        memory.device_ptr(&self.0).0
    }

    unsafe fn launch(&self, launch: &Launch) -> Result<()> {
        let Launch { kernel, grid, block, shared_bytes, cluster, params, tensor_maps, .. } = launch;
        let failed = |e: Error| {
            e.context(format!(
                "launching {kernel} with {grid:?} blocks in clusters of {cluster}, {block:?} threads and {shared_bytes} bytes of \
                 shared memory a block"
            ))
        };
        let context = self.0.context();
        context.bind_to_thread().map_err(|e| failed(Error::wrap(e)))?;
        let known = context::of(context).map_err(failed)?;
        let kernel = modules::kernel(context, &known.kernels, kernel).map_err(failed)?;
        kernel.permit_shared(*shared_bytes, known.gpu.shared_bytes).map_err(failed)?;
        let mut params = params.clone();
        for (start, map) in tensor_maps {
            let encoded = known.maps.get_or(map, encode).map_err(failed)?;
            params[*start..*start + encoded.len()].copy_from_slice(&encoded);
        }
        let mut attributes = attributes(launch);
        let config = CUlaunchConfig {
            gridDimX: grid[0],
            gridDimY: grid[1],
            gridDimZ: grid[2],
            blockDimX: block[0],
            blockDimY: block[1],
            blockDimZ: block[2],
            sharedMemBytes: *shared_bytes,
            hStream: self.0.cu_stream(),
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
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
