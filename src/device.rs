//! The device a user asks for by name.

use crate::{Error, Result};
use candle_core::Device;

/// `cpu`, or `cuda` / `cuda:N`: the first or the N-th GPU, if the crate was built with the `cuda` feature. The GPU's
/// memory that tensors give back stays with this process, for the tensors of the next step.
///
/// ```
/// use candle_sam_lora::{device, gpus, release_buffers};
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let first = if gpus().unwrap_or(0) > 0 { "cuda" } else { "cpu" };
/// println!("on {first}: {:?}", device(first)?);
/// assert!(device("cpu")?.is_cpu());
/// assert!(device("tpu").is_err());
/// release_buffers(); // the CPU's, after the last operation
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// For any other name; for `cuda` without the feature, without a driver, or without such a device.
pub fn device(name: &str) -> Result<Device> {
    let unknown =
        || Error::config(format!("unknown device {name:?}; expected cpu, cuda or cuda:N"));
    match name.split_once(':').unwrap_or((name, "")) {
        ("cpu", "") if name == "cpu" => Ok(Device::Cpu),
        ("cuda", "") if name == "cuda" => cuda(name, 0),
        ("cuda", ordinal) => cuda(name, ordinal.parse().map_err(|_| unknown())?),
        _ => Err(unknown()),
    }
}

/// Number of GPUs that this process sees.
///
/// [Example](crate::device())
///
/// # Errors
/// - without the feature `cuda`, or without a driver.
pub fn gpus() -> Result<usize> {
    #[cfg(feature = "cuda")]
    return candle_core::cuda_backend::cudarc::driver::CudaContext::device_count()
        .map(|count| count as usize)
        .map_err(|e| Error::config(format!("device cuda: the driver does not count GPUs: {e}")));
    #[cfg(not(feature = "cuda"))]
    Err(without_cuda("cuda"))
}

#[cfg(feature = "cuda")]
fn cuda(name: &str, ordinal: usize) -> Result<Device> {
    let failed =
        |what: &str, e: candle_core::Error| Error::config(format!("device {name}: {what}: {e}"));
    let device = Device::new_cuda(ordinal)
        .map_err(|e| failed("there is no such GPU, or no CUDA driver for it", e))?;
    let gpu = device.as_cuda_device().map_err(|e| failed("no GPU", e))?;
    crate::driver::keep_freed_memory(gpu).map_err(|e| failed("its memory pool", e))?;
    Ok(device)
}

#[cfg(not(feature = "cuda"))]
fn cuda(name: &str, _ordinal: usize) -> Result<Device> {
    Err(without_cuda(name))
}

#[cfg(not(feature = "cuda"))]
fn without_cuda(name: &str) -> Error {
    let message = "this build runs on the CPU only; build with --features cuda, or use cpu";
    Error::config(format!("device {name}: {message}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_device_are_refused() {
        assert!(device("cpu").is_ok());
        for name in ["", "CPU", "cpu:0", "cpu:", "metal", "cuda:", "cuda:x", "cuda:-1", "cuda0"] {
            let message = device(name).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains("expected cpu, cuda or cuda:N"), "{name}: {message}");
        }
    }

    #[test]
    #[cfg(not(feature = "cuda"))]
    fn without_the_feature_the_error_says_how_to_get_it() {
        for name in ["cuda", "cuda:1"] {
            let message = device(name).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains(name) && message.contains("--features cuda"), "{message}");
        }
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn a_device_that_is_not_there_is_an_error() {
        let message = device("cuda:4096").map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("cuda:4096") && message.contains("no such GPU"), "{message}");
    }
}
