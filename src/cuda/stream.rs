//! The CUDA driver as a back end of [`crate::launch`]: memory and launches in the order of one stream.

use super::kernels::{kernels, Kernels};
use super::{modules, tensor_map};
use crate::launch::projection_sm90::Hopper;
use crate::launch::{device_ptr, Backend, Launch};
use candle_core::cuda_backend::cudarc::driver::sys::{
    cuDriverGetVersion, cuLaunchKernelEx, CUdevice_attribute_enum, CUlaunchAttribute,
    CUlaunchAttributeID, CUlaunchAttributeValue, CUlaunchConfig,
};
use candle_core::cuda_backend::cudarc::driver::{CudaContext, CudaSlice, CudaStream, DevicePtr};
use candle_core::{CudaDevice, Error, Result};
use std::sync::Arc;

/// Major and minor, if the driver says.
pub(super) fn capability(device: &CudaDevice) -> Option<(i32, i32)> {
    device.cuda_stream().context().compute_capability().ok()
}

/// Whether to run the kernels for Hopper: on compute capability 9.0, if compiled for it and not asked for the portable
/// ones.
pub(crate) fn is_hopper(device: &CudaDevice) -> bool {
    kernels() != Kernels::Portable && capability(device).is_some_and(modules::cover_hopper)
}

/// Whether this device can run the kernels: compute capability 8.0 or newer, and compiled for it.
pub(crate) fn supported(device: &CudaDevice) -> bool {
    capability(device).is_some_and(|capability| capability >= (8, 0) && modules::cover(capability))
}

/// Bytes of shared memory that a block may opt into; 0 if the driver does not say.
pub(crate) fn shared_memory(device: &CudaDevice) -> usize {
    most_shared(device.cuda_stream().context())
}

fn most_shared(context: &CudaContext) -> usize {
    let limit = CUdevice_attribute_enum::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN;
    let bytes = context.attribute(limit);
    bytes.ok().and_then(|bytes| usize::try_from(bytes).ok()).unwrap_or(0)
}

/// What launches hang on, if the device runs the kernels for Hopper: one multiprocessor and no clusters if the driver does
/// not say.
pub(crate) fn hopper(device: &CudaDevice) -> Option<Hopper> {
    use CUdevice_attribute_enum as Attribute;
    if !is_hopper(device) {
        return None;
    }
    let context = device.cuda_stream().context().clone();
    let ask = |attribute| context.attribute(attribute).ok();
    let count = ask(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT);
    let multiprocessors = count.and_then(|count| u32::try_from(count).ok()).unwrap_or(1);
    let clusters = ask(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH) == Some(1);
    Some(Hopper { multiprocessors, clusters })
}

/// Whether a kernel may begin before the one before it has ended: on Hopper and newer devices; with drivers for CUDA 12.3
/// and newer, which keep the permission as an edge of a graph where launches are captured.
fn dependents_begin_early(capability: Option<(i32, i32)>, driver: Option<i32>) -> bool {
    capability >= Some((9, 0)) && driver >= Some(12_030)
}

/// As CUDA counts, 12030 for 12.3, if the driver says.
fn driver_version() -> Option<i32> {
    let mut version = 0;
    // SAFETY: writes the integer.
    unsafe { cuDriverGetVersion(&mut version) }.result().ok().map(|()| version)
}

/// What a launch asks of the driver beside its size.
fn attributes(launch: &Launch, capability: Option<(i32, i32)>) -> Vec<CUlaunchAttribute> {
    let mut attributes = Vec::new();
    let mut add = |id, set: &dyn Fn(&mut CUlaunchAttributeValue)| {
        let mut value = CUlaunchAttributeValue { pad: [0; 64] };
        set(&mut value);
        attributes.push(CUlaunchAttribute { id, pad: [0; 4], value });
    };
    let early = launch.begins_early && kernels() != Kernels::NativeInTurn;
    if early && dependents_begin_early(capability, driver_version()) {
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
        let function = modules::function(context, kernel).map_err(failed)?;
        modules::permit_shared(&function, *shared_bytes, most_shared(context)).map_err(failed)?;
        let mut params = params.clone();
        for (start, map) in tensor_maps {
            let encoded = tensor_map::encode(map).map_err(failed)?;
            params[*start..*start + encoded.len()].copy_from_slice(&encoded);
        }
        let mut attributes = attributes(launch, context.compute_capability().ok());
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
        // SAFETY: the one argument is the params struct by value, which the driver copies before it returns; host
        // and kernel have it from one header, with its size asserted on both sides. The attributes outlive the call.
        // That the addresses in the params stay valid is the caller's promise.
        unsafe {
            let (function, arguments) = (function.cu_function(), arguments.as_mut_ptr());
            cuLaunchKernelEx(&config, function, arguments, std::ptr::null_mut()).result()
        }
        .map_err(|e| failed(Error::wrap(e)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_begin_early_where_devices_and_graphs_know_it() {
        assert!(dependents_begin_early(Some((9, 0)), Some(12_030)));
        assert!(dependents_begin_early(Some((10, 0)), Some(13_000)));
        assert!(!dependents_begin_early(Some((8, 9)), Some(13_000)));
        assert!(!dependents_begin_early(Some((9, 0)), Some(12_020)));
        assert!(!dependents_begin_early(None, Some(13_000)));
        assert!(!dependents_begin_early(Some((9, 0)), None));
    }
}
