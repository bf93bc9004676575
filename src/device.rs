//! The device a user asks for by name.

use crate::{Error, Result};
use candle_core::Device;

/// `cpu`, or `cuda` / `cuda:N`.
///
/// # Errors
/// For any other name. For `cuda`: this version has no CUDA kernels yet; the `cuda` feature compiles the CPU path.
pub fn device(name: &str) -> Result<Device> {
    match name.split(':').next() {
        Some("cpu") if name == "cpu" => Ok(Device::Cpu),
        Some("cuda") => Err(Error::config(format!(
            "device {name}: this version of candle-sam-lora has no CUDA kernels yet{}; use --device cpu",
            if cfg!(feature = "cuda") { " (the cuda feature compiles the CPU path)" } else { "" }
        ))),
        _ => Err(Error::config(format!("unknown device {name:?}; expected cpu, cuda or cuda:N"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_cpu_can_be_had() {
        assert!(device("cpu").is_ok());
        for name in ["cuda", "cuda:1"] {
            let message = device(name).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains("CUDA"), "{message}");
        }
        for name in ["", "CPU", "cpu:0", "metal"] {
            let message = device(name).map(|_| ()).unwrap_err().to_string();
            assert!(message.contains("expected cpu, cuda"), "{message}");
        }
    }
}
