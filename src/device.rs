//! The device a user asks for by name.

use crate::{Error, Result};
use candle_core::Device;

/// `cpu`, or `cuda` / `cuda:N`: the first or the N-th GPU, if the crate was built with the `cuda` feature. The GPU's
/// memory that tensors give back stays with this process, for the tensors of the next step. `metal` / `metal:N` is a
/// GPU of Apple's, if the crate was built with `metal`.
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
/// - any other name;
/// - `cuda` or `metal` without the feature, without a driver, or without such a device.
pub fn device(name: &str) -> Result<Device> {
    let unknown = || {
        Error::config(format!(
            "unknown device {name:?}; expected cpu, cuda, cuda:N, metal or metal:N"
        ))
    };
    match name.split_once(':').unwrap_or((name, "")) {
        ("cpu", "") if name == "cpu" => Ok(Device::Cpu),
        ("cuda", "") if name == "cuda" => cuda(name, 0),
        ("cuda", ordinal) => cuda(name, ordinal.parse().map_err(|_| unknown())?),
        ("metal", "") if name == "metal" => metal(name, 0),
        ("metal", ordinal) => metal(name, ordinal.parse().map_err(|_| unknown())?),
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
    Err(without("cuda", "cuda"))
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
    Err(without("cuda", name))
}

fn metal(name: &str, ordinal: usize) -> Result<Device> {
    if !cfg!(feature = "metal") {
        return Err(without("metal", name));
    }
    Device::new_metal(ordinal).map_err(|e| Error::config(format!("device {name}: {e}")))
}

/// This build lacks the feature that the device `name` needs.
fn without(feature: &str, name: &str) -> Error {
    Error::config(format!(
        "device {name}: this build has no {feature}; build with --features {feature}, or use cpu"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_are_no_device_are_refused() {
        assert!(device("cpu").is_ok());
        for name in ["", "CPU", "cpu:0", "cpu:", "metal:", "cuda:", "cuda:x", "cuda:-1", "cuda0"] {
            let message = device(name).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains("expected cpu, cuda, cuda:N"), "{name}: {message}");
        }
    }

    #[test]
    fn without_the_feature_the_error_says_how_to_get_it() {
        let without = [("cuda", cfg!(feature = "cuda")), ("metal", cfg!(feature = "metal"))];
        for (feature, _) in without.into_iter().filter(|(_, built)| !built) {
            for name in [feature.to_string(), format!("{feature}:1")] {
                let message = device(&name).map(|_| ()).unwrap_err().to_string();
                let advice = format!("--features {feature}");
                assert!(message.contains(&name) && message.contains(&advice), "{message}");
            }
        }
    }

    #[test]
    #[cfg(feature = "cuda")]
    fn a_device_that_is_not_there_is_an_error() {
        let message = device("cuda:4096").map(|_| ()).unwrap_err().to_string();
        assert!(message.contains("cuda:4096") && message.contains("no such GPU"), "{message}");
    }
}
