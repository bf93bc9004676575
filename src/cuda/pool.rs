//! The pool of a GPU's memory that candle's tensors come from.

use candle_core::cuda_backend::cudarc::driver::result::device::get_default_mem_pool;
use candle_core::cuda_backend::cudarc::driver::sys::{cuMemPoolSetAttribute, CUmemPool_attribute};
use candle_core::{CudaDevice, Error, Result};

/// Keeps freed memory in the pool. Else whatever is free goes back to the system whenever somebody waits for the
/// GPU, and the next step maps all of it again.
pub(crate) fn keep_freed_memory(device: &CudaDevice) -> Result<()> {
    let stream = device.cuda_stream();
    let context = stream.context();
    if !context.has_async_alloc() {
        return Ok(()); // without pools, memory is freed at once
    }
    context.bind_to_thread().map_err(Error::wrap)?;
    let threshold = CUmemPool_attribute::CU_MEMPOOL_ATTR_RELEASE_THRESHOLD;
    let mut everything = u64::MAX;
    // SAFETY: the device is one that candle has opened; the attribute is a u64, read before the call returns.
    unsafe {
        let pool = get_default_mem_pool(context.cu_device()).map_err(Error::wrap)?;
        cuMemPoolSetAttribute(pool, threshold, (&raw mut everything).cast()).result()
    }
    .map_err(Error::wrap)
}
