//! The peak of the memory in use: of this process, or of a GPU if the run is there.

use candle_core::Device;

/// Bytes in use at some time.
pub enum Memory {
    Resident(u64),
    #[cfg(feature = "cuda")]
    Gpu(gpu::Pool, u64),
}

impl Memory {
    /// Now, with the peak set back to it. (Linux; `ru_maxrss` is no substitute, a process inherits it from the one
    /// that started it.)
    pub fn now(device: &Device) -> Option<Self> {
        #[cfg(feature = "cuda")]
        if let Device::Cuda(device) = device {
            let pool = gpu::Pool::of(device)?;
            return Some(Self::Gpu(pool, pool.reset_peak()?));
        }
        if !device.is_cpu() {
            return None;
        }
        std::fs::write("/proc/self/clear_refs", "5").ok()?;
        resident().map(Self::Resident)
    }

    /// The peak since, of all that tensors take of a GPU; none on the CPU.
    pub fn gpu_peak(&self) -> Option<u64> {
        match self {
            Self::Resident(_) => None,
            #[cfg(feature = "cuda")]
            Self::Gpu(pool, _) => pool.peak(),
        }
    }

    /// How far the peak has risen since.
    pub fn growth(&self) -> Option<u64> {
        match self {
            Self::Resident(before) => Some(peak_resident()?.saturating_sub(*before)),
            #[cfg(feature = "cuda")]
            Self::Gpu(pool, before) => Some(pool.peak()?.saturating_sub(*before)),
        }
    }
}

/// Bytes of this process in memory now.
pub fn resident() -> Option<u64> {
    status("VmRSS")
}

/// The most bytes of this process in memory since [`Memory::now`].
pub fn peak_resident() -> Option<u64> {
    status("VmHWM")
}

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))?;
    Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
}

/// The pool that candle's tensors come from: PyTorch's `max_memory_allocated` counts the same of its own.
#[cfg(feature = "cuda")]
mod gpu {
    use candle_core::backend::BackendDevice;
    use candle_core::cuda_backend::cudarc::driver::result::device::get_default_mem_pool;
    use candle_core::cuda_backend::cudarc::driver::sys::{
        cuMemPoolGetAttribute, cuMemPoolSetAttribute, CUmemPool_attribute, CUmemoryPool,
    };
    use candle_core::CudaDevice;

    #[derive(Clone, Copy)]
    pub struct Pool(CUmemoryPool);

    impl Pool {
        pub fn of(device: &CudaDevice) -> Option<Self> {
            device.synchronize().ok()?;
            let ordinal = device.cuda_stream().context().cu_device();
            // SAFETY: the device is one that candle has opened.
            unsafe { get_default_mem_pool(ordinal) }.ok().map(Self)
        }

        /// Memory in use; the peak starts from there.
        pub fn reset_peak(self) -> Option<u64> {
            let high = CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH;
            let mut zero = 0u64;
            // SAFETY: this attribute is a u64, and may be set to 0 alone.
            unsafe { cuMemPoolSetAttribute(self.0, high, (&raw mut zero).cast()) }.result().ok()?;
            self.get(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_CURRENT)
        }

        pub fn peak(self) -> Option<u64> {
            self.get(CUmemPool_attribute::CU_MEMPOOL_ATTR_USED_MEM_HIGH)
        }

        fn get(self, attribute: CUmemPool_attribute) -> Option<u64> {
            let mut value = 0u64;
            // SAFETY: both attributes are u64.
            unsafe { cuMemPoolGetAttribute(self.0, attribute, (&raw mut value).cast()) }
                .result()
                .ok()?;
            Some(value)
        }
    }
}
