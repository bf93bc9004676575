//! The compiled kernels, embedded by build.rs, and what of them has been loaded into which context.

use crate::launch::file_of;
use candle_core::cuda_backend::cudarc::driver::{sys, CudaContext, CudaFunction, CudaModule};
use candle_core::cuda_backend::cudarc::nvrtc::Ptx;
use candle_core::{bail, Error, Result};
use std::collections::HashMap;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

// IMAGES: name and fat binary of every file of kernels; CAPABILITIES: what they were compiled for, sorted.
include!(concat!(env!("OUT_DIR"), "/images.rs"));

/// Whether there is code for a device of this compute capability: its own or PTX of an older one.
pub(super) fn cover((major, minor): (i32, i32)) -> bool {
    CAPABILITIES.first().is_some_and(|&lowest| i64::from(lowest) <= i64::from(10 * major + minor))
}

/// Whether there is code for Hopper (`kernels/sm90`), which runs on this compute capability alone.
pub(super) fn cover_hopper(capability: (i32, i32)) -> bool {
    capability == (9, 0) && CAPABILITIES.contains(&90)
}

/// A context and an index into [`IMAGES`], or a context and a kernel. The cached modules keep their context alive, so
/// its address is nobody else's.
#[derive(Default)]
struct Loaded {
    modules: HashMap<(usize, usize), Arc<CudaModule>>,
    functions: HashMap<(usize, String), CudaFunction>,
}

/// The kernel, loaded with its file when it is first asked for.
pub(super) fn function(context: &Arc<CudaContext>, kernel: &str) -> Result<CudaFunction> {
    static LOADED: OnceLock<Mutex<Loaded>> = OnceLock::new();
    let loaded = LOADED.get_or_init(Default::default);
    let mut loaded = loaded.lock().unwrap_or_else(PoisonError::into_inner);
    let id = context.cu_ctx() as usize;
    if let Some(function) = loaded.functions.get(&(id, kernel.to_string())) {
        return Ok(function.clone());
    }
    let files = IMAGES.iter().map(|(name, _)| *name);
    let Some(index) = file_of(kernel, files) else { bail!("no file of kernels holds {kernel}") };
    let module = match loaded.modules.get(&(id, index)) {
        Some(module) => module.clone(),
        None => {
            let (name, image) = IMAGES[index];
            let module = context.load_module(Ptx::from_binary(image.to_vec())).map_err(|e| {
                Error::wrap(e)
                    .context(format!("loading the kernels {name}, compiled for {CAPABILITIES:?}"))
            })?;
            loaded.modules.insert((id, index), module.clone());
            module
        }
    };
    let function = module
        .load_function(kernel)
        .map_err(|e| Error::wrap(e).context(format!("kernel {kernel} in {}", IMAGES[index].0)))?;
    loaded.functions.insert((id, kernel.to_string()), function.clone());
    Ok(function)
}

/// Lets a kernel have all that a block may have, if it wants more than the 48 KiB of shared memory that need no
/// permission. Never less: a graph may hold a launch that wants more than this one.
pub(super) fn permit_shared(function: &CudaFunction, bytes: u32, most: usize) -> Result<()> {
    const FREE: u32 = 48 * 1024;
    if bytes > FREE {
        let attribute =
            sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // The kernels have no other shared memory.
        let most = most.max(bytes as usize) as i32;
        function.set_attribute(attribute, most).map_err(Error::wrap)?;
    }
    Ok(())
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

    #[test]
    fn newer_devices_are_covered_and_older_ones_are_not() {
        let Some(&lowest) = CAPABILITIES.first() else { return };
        let lowest = lowest as i32;
        assert!(cover((lowest / 10, lowest % 10)) && cover((99, 0)));
        assert!(!cover((7, 5)));
    }
}
