//! The facts of a CUDA context: asked of the driver once, loaded once, tested once.

use super::modules::{Loaded, CAPABILITIES};
use super::tensor_map::EncodedMaps;
use super::trust::{Key, Tested};
use crate::launch::self_test::{choice, Choice, SelfTestRow};
use crate::launch::tiles::Forced;
use crate::launch::Gpu;
use candle_core::cuda_backend::cudarc::driver::sys::{
    cuDriverGetVersion, CUdevice_attribute_enum as Attribute,
};
use candle_core::cuda_backend::cudarc::driver::CudaContext;
use candle_core::{CudaDevice, Error, Result};
use std::sync::{Arc, PoisonError, RwLock};

/// Asks the driver for the properties of a context's device.
fn ask(context: &CudaContext) -> Result<Gpu> {
    let ask = |attribute| {
        context.attribute(attribute).map_err(|e| {
            Error::wrap(e).context(format!("asking the GPU for its attribute {attribute:?}"))
        })
    };
    let count = |attribute| ask(attribute).map(|n| u32::try_from(n).unwrap_or(0));
    let (major, minor) = context.compute_capability().map_err(Error::wrap)?;
    let capability = (major.unsigned_abs(), minor.unsigned_abs());
    // As CUDA counts: 12030 for 12.3.
    let mut driver = 0;
    // SAFETY: writes the integer.
    unsafe { cuDriverGetVersion(&mut driver) }.result().map_err(Error::wrap)?;
    let gpu = Gpu {
        capability,
        multiprocessors: count(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
        shared_bytes: count(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
            as usize,
        // Drivers for CUDA before 11.8 know neither clusters nor the attribute.
        clusters: ask(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH).is_ok_and(|n| n == 1),
        early_launch: Gpu::launches_early(capability, driver),
        portable: false,
        native: None,
        forced: Forced::NONE,
    };
    Ok(gpu.with_kernels(CAPABILITIES))
}

/// A context, and all that is kept for it.
pub(super) struct Context {
    /// Held, so that the context's address is nobody else's.
    context: Arc<CudaContext>,
    pub gpu: Gpu,
    pub kernels: RwLock<Loaded>,
    pub maps: EncodedMaps,
    pub tested: Tested,
}

/// The facts of this context. They are kept until the process ends, as the kernels are: a graph may hold them.
///
/// # Errors
/// If the driver does not say what the device is.
pub(super) fn of(context: &Arc<CudaContext>) -> Result<&'static Context> {
    static ALL: RwLock<Vec<&'static Context>> = RwLock::new(Vec::new());
    let find = |all: &[&'static Context]| {
        all.iter().copied().find(|known| known.context.cu_ctx() == context.cu_ctx())
    };
    if let Some(known) = find(&ALL.read().unwrap_or_else(PoisonError::into_inner)) {
        return Ok(known);
    }
    let gpu = ask(context)?;
    let mut all = ALL.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = find(&all) {
        return Ok(known);
    }
    let known: &'static Context = Box::leak(Box::new(Context {
        context: context.clone(),
        gpu,
        kernels: RwLock::default(),
        maps: EncodedMaps::default(),
        tested: Tested::default(),
    }));
    all.push(known);
    Ok(known)
}

/// The context of a candle device.
///
/// # Errors
/// As [`of`].
pub(super) fn of_device(device: &CudaDevice) -> Result<&'static Context> {
    of(device.cuda_stream().context())
}

/// The GPU as launches are planned for it. None if the driver does not describe the device, or the build has no kernels
/// for it.
pub(crate) fn gpu(device: &CudaDevice) -> Option<Gpu> {
    of_device(device).ok().map(|context| context.gpu).filter(|gpu| gpu.portable)
}

/// The choice for a family on this device; none if the family was never tested there.
///
/// # Errors
/// If the driver does not say what the device is.
pub(crate) fn tested(device: &CudaDevice, key: Key) -> Result<Option<Choice>> {
    Ok(of_device(device)?.tested.get(key))
}

/// Keeps what a test found: what computes the family's problems from now on, and whether that is news.
///
/// # Errors
/// As [`tested`].
pub(crate) fn keep_test(
    device: &CudaDevice,
    key: Key,
    rows: &[SelfTestRow],
) -> Result<(Choice, bool)> {
    Ok(of_device(device)?.tested.keep(key, choice(rows)))
}
