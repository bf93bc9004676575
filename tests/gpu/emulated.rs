//! The GPU against the emulator, which runs the same kernels from their sources: on machines that have these and a C++
//! compiler.

#[path = "../kernels/device.rs"]
mod device;

use crate::common::{error, random, values};
use crate::trial;
use candle_core::{DType, Device, Result};
use candle_sam_lora::launch::{layer_norm, LayerNormProblem};
use candle_sam_lora::ops;
use device::{in_every_mode, launch_all, Memory, DTYPES};
use libtest_mimic::Trial;
use std::path::Path;

pub fn trials() -> Vec<Trial> {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").is_dir();
    let trials = DTYPES.map(|dtype| {
        trial(format!("emulator layer_norm {}", dtype.as_str()), move |d| layer_norm_of(dtype, d))
            .with_ignored_flag(!here)
    });
    trials.into()
}

/// Between the two lie the GPU's division and square root, and the order in which nothing is left free.
fn bound(dtype: DType) -> f64 {
    match dtype {
        DType::F32 => 1e-6,
        DType::F16 => 1.0 / 1024.0,
        _ => 1.0 / 128.0,
    }
}

fn layer_norm_of(dtype: DType, device: &Device) -> Result<()> {
    let (rows, size, eps) = (37, 768, 1e-6);
    let tensors = [random(1, (rows, size)), random(2, size), random(3, size)];
    let [x, weight, bias] = tensors.each_ref().map(|t| t.to_dtype(dtype));
    let (x, weight, bias) = (x?, weight?, bias?);
    let [from_x, from_weight, from_bias] = [&x, &weight, &bias].map(Memory::from_tensor);
    let problem = LayerNormProblem { rows, size, eps };
    let outputs = in_every_mode("layer_norm", |device| {
        let y = Memory::for_elements(rows * size, dtype);
        let [x, weight, bias] = [&from_x, &from_weight, &from_bias].map(Memory::address);
        let launch = layer_norm::forward(&problem, dtype, x, weight, bias, y.address())?;
        launch_all(device, &[launch])?;
        Ok(vec![y])
    });
    let on = |t: &candle_core::Tensor| t.to_device(device);
    let y = ops::layer_norm(&on(&x)?, &on(&weight)?, &on(&bias)?, eps)?;
    let error = error(&values(&y), &outputs[0].values(dtype));
    assert!(error <= bound(dtype), "{dtype:?}: GPU and emulator differ by {error:e}");
    Ok(())
}
