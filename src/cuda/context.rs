//! The facts of a CUDA context: asked of the driver once, loaded once, tested once.

use super::modules::Loaded;
use super::tensor_map::EncodedMaps;
use super::trust::Tested;
use candle_core::cuda_backend::cudarc::driver::sys::{
    cuDriverGetVersion, CUdevice_attribute_enum as Attribute,
};
use candle_core::cuda_backend::cudarc::driver::CudaContext;
use candle_core::{CudaDevice, Error, Result};
use std::sync::{Arc, PoisonError, RwLock};

/// Properties of a device and its driver.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Properties {
    /// Major and minor.
    pub capability: (i32, i32),
    /// Bytes of shared memory that a block may opt into.
    pub shared_memory: usize,
    pub multiprocessors: u32,
    /// Whether clusters of blocks can be launched.
    pub clusters: bool,
    /// The CUDA version of the driver, as CUDA counts: 12030 for 12.3.
    pub driver: i32,
}

impl Properties {
    fn ask(context: &CudaContext) -> Result<Self> {
        let ask = |attribute| {
            context.attribute(attribute).map_err(|e| {
                Error::wrap(e).context(format!("asking the GPU for its attribute {attribute:?}"))
            })
        };
        let count = |attribute| ask(attribute).map(|n| u32::try_from(n).unwrap_or(0));
        let capability = context.compute_capability().map_err(Error::wrap)?;
        let mut driver = 0;
        // SAFETY: writes the integer.
        unsafe { cuDriverGetVersion(&mut driver) }.result().map_err(Error::wrap)?;
        Ok(Self {
            capability,
            shared_memory: count(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?
                as usize,
            multiprocessors: count(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?.max(1),
            // Drivers for CUDA before 11.8 know neither clusters nor the attribute.
            clusters: ask(Attribute::CU_DEVICE_ATTRIBUTE_CLUSTER_LAUNCH).is_ok_and(|n| n == 1),
            driver,
        })
    }
}

/// A context, and all that is kept for it.
pub(super) struct Context {
    /// Held, so that the context's address is nobody else's.
    context: Arc<CudaContext>,
    pub properties: Properties,
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
    let properties = Properties::ask(context)?;
    let mut all = ALL.write().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = find(&all) {
        return Ok(known);
    }
    let known: &'static Context = Box::leak(Box::new(Context {
        context: context.clone(),
        properties,
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

/// The properties of a candle device, if the driver says them.
pub(super) fn properties(device: &CudaDevice) -> Option<Properties> {
    of_device(device).ok().map(|context| context.properties)
}
