//! The compiled kernels, embedded by build.rs, and which of them a context has loaded.

use crate::launch::cache::QuickMap;
use crate::launch::file_of;
use candle_core::cuda_backend::cudarc::driver::{sys, CudaContext, CudaFunction, CudaModule};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{bail, Error, Result};
use std::collections::HashMap;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, PoisonError, RwLock};

// IMAGES: name and fat binary of every file of kernels; CAPABILITIES: what they were compiled for, sorted; COMPILER: by
// what.
include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// The modules and kernels that a context has loaded.
#[derive(Default)]
pub(super) struct Loaded {
    /// By their place in [`IMAGES`].
    modules: HashMap<usize, Arc<CudaModule>>,
    /// They stay until the process ends: a graph may hold them.
    kernels: QuickMap<String, &'static Kernel>,
}

/// A loaded kernel.
pub(super) struct Kernel {
    pub function: CudaFunction,
    /// Dynamic shared memory that its blocks may have.
    permitted: AtomicU32,
}

/// The kernel, loaded with its file when it is first asked for.
pub(super) fn kernel(
    context: &Arc<CudaContext>,
    loaded: &RwLock<Loaded>,
    name: &str,
) -> Result<&'static Kernel> {
    if let Some(kernel) = loaded.read().unwrap_or_else(PoisonError::into_inner).kernels.get(name) {
        return Ok(kernel);
    }
    loaded.write().unwrap_or_else(PoisonError::into_inner).load(context, name)
}

impl Loaded {
    fn load(&mut self, context: &Arc<CudaContext>, name: &str) -> Result<&'static Kernel> {
        // Another thread may have been first.
        if let Some(kernel) = self.kernels.get(name) {
            return Ok(kernel);
        }
        let files = IMAGES.iter().map(|(name, _)| *name);
        let Some(index) = file_of(name, files) else { bail!("no file of kernels holds {name}") };
        let module = match self.modules.get(&index) {
            Some(module) => module.clone(),
            None => {
                let (file, image) = IMAGES[index];
                let module =
                    context.load_module(Ptx::from_binary(image.to_vec())).map_err(|e| {
                        Error::wrap(e).context(format!(
                            "loading the kernels {file}, compiled for {CAPABILITIES:?}"
                        ))
                    })?;
                self.modules.insert(index, module.clone());
                module
            }
        };
        let function = module
            .load_function(name)
            .map_err(|e| Error::wrap(e).context(format!("kernel {name} in {}", IMAGES[index].0)))?;
        let permitted = AtomicU32::new(FREE_SHARED);
        let kernel: &'static Kernel = Box::leak(Box::new(Kernel { function, permitted }));
        self.kernels.insert(name.to_string(), kernel);
        Ok(kernel)
    }
}

/// Shared memory that needs no permission.
const FREE_SHARED: u32 = 48 * 1024;

impl Kernel {
    /// Raises the kernel's limit of shared memory to the device's, if a launch wants more than it may have. Never
    /// lowers it: a graph may hold a launch that wants more than this one.
    pub fn permit_shared(&self, bytes: u32, most: usize) -> Result<()> {
        if bytes <= self.permitted.load(Ordering::Relaxed) {
            return Ok(());
        }
        let attribute =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // The kernels have no other shared memory.
        let most = u32::try_from(most).unwrap_or(0).max(bytes);
        self.function.set_attribute(attribute, most as i32).map_err(Error::wrap)?;
        self.permitted.store(most, Ordering::Relaxed);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_file_of_kernels_is_embedded_as_a_fat_binary() {
        if CAPABILITIES.is_empty() {
            return; // built for older devices only
        }
        assert!(IMAGES.iter().any(|(name, _)| *name == "layer_norm_fwd"));
        for (name, image) in IMAGES {
            // The magic number of a fat binary.
            assert_eq!(image.get(..4), Some(&0xBA55_ED50u32.to_le_bytes()[..]), "{name}");
        }
    }
}
