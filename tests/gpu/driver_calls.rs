//! The host's work of a launch, in calls of the driver, as its stand-in counts them.

use crate::common::random;
use crate::trial;
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_sam_lora::cuda::{available_kernels, set_kernels, Kernels};
use candle_sam_lora::ops::{self, Activation, Lora, Projection, RelPosAttention};
use libloading::os::unix::Library;
use libtest_mimic::Trial;
use std::ffi::{c_char, CString};

/// A function of the driver's stand-in; none with a real driver.
///
/// # Safety
/// `F` is the type of the function of this name in emulator/driver/src.
pub unsafe fn stand_in<F: Copy>(name: &str) -> Option<F> {
    let name = CString::new(name).ok()?;
    // SAFETY: the caller's promise. The library stays loaded as long as the process.
    unsafe { Some(*Library::this().get::<F>(name.as_bytes_with_nul()).ok()?) }
}

/// How often functions of the driver were called, or kernels launched, whose names begin so; none with a real driver.
pub fn calls(prefix: &str) -> Option<u64> {
    let prefix = CString::new(prefix).ok()?;
    // SAFETY: the function has this type, and gets a string.
    unsafe {
        let count: unsafe extern "C" fn(*const c_char) -> u64 = stand_in("emulated_driver_calls")?;
        Some(count(prefix.as_ptr()))
    }
}

/// Driver functions to be called once, and not again for each launch.
const ONCE: [&str; 5] = [
    "cuDeviceGetAttribute",
    "cuDriverGetVersion",
    "cuFuncSetAttribute",
    "cuModuleGetFunction",
    "cuModuleLoadData",
];

pub fn trials() -> Vec<Trial> {
    let emulated = calls("").is_some();
    let trial = |name: &str, test: fn(&Device) -> Result<()>| {
        trial(format!("driver calls {name}"), test).with_ignored_flag(!emulated)
    };
    vec![
        trial("attention", attention),
        trial("projection", projection),
        trial("set_kernels before a backward", set_kernels_before_a_backward),
    ]
}

/// Runs an operation twice; the calls and launches of the second run.
fn repeated(run: impl Fn() -> Result<Tensor>) -> Result<impl Fn(&str) -> u64> {
    run()?;
    let names =
        ONCE.into_iter().chain(["cuTensorMapEncodeTiled", "cuLaunchKernel", "cuCtxGetCurrent"]);
    let count = |name: &str| calls(name).unwrap_or_default();
    let before: Vec<_> = names.map(|name| (name, count(name))).collect();
    run()?;
    let after: Vec<_> = before.iter().map(|&(name, n)| (name, count(name) - n)).collect();
    println!("a repeated run: {after:?}");
    Ok(move |name: &str| after.iter().find(|(n, _)| *n == name).map_or(0, |(_, count)| *count))
}

fn attention(device: &Device) -> Result<()> {
    let tensor =
        |seed, shape: &[usize]| random(seed, shape).to_dtype(DType::BF16)?.to_device(device);
    let (qkv, h, w) = (tensor(1, &[1, 3, 64, 192])?, tensor(2, &[5, 64])?, tensor(3, &[127, 64])?);
    let config = RelPosAttention {
        num_heads: 1,
        softmax_scale: 0.125,
        rel_pos: Some((&h, &w)),
        window: None,
        pad: None,
        dropout: None,
    };
    let calls = repeated(|| ops::rel_pos_attention(&qkv, &config))?;
    assert_eq!(ONCE.map(&calls), [0; 5]);
    // Its maps are those of the inputs, which are where they were.
    assert_eq!((calls("cuTensorMapEncodeTiled"), calls("cuLaunchKernel")), (0, 1));
    Ok(())
}

/// Large enough for Hopper's kernels.
fn projection(device: &Device) -> Result<()> {
    let tensor =
        |seed, shape: &[usize]| random(seed, shape).to_dtype(DType::BF16)?.to_device(device);
    let (x, weight) = (tensor(1, &[1793, 64])?, tensor(2, &[1152, 64])?);
    let (bias, a, b) = (tensor(3, &[1152])?, tensor(4, &[8, 64])?, tensor(5, &[1152, 8])?);
    let (a, b) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    let lora = Lora { a: &a, b: &b, b_bias: None, scaling: 1.0, dropout: None };
    let part = Projection { weight: &weight, scales: None, bias: Some(&bias), lora: Some(lora) };
    let calls = repeated(|| ops::lora_linear(&x, &part, Activation::Identity, None))?;
    assert_eq!(ONCE.map(&calls), [0; 5]);
    // x, the weight and b are where they were; the output and S may be somewhere else.
    assert!(calls("cuTensorMapEncodeTiled") <= 2, "{}", calls("cuTensorMapEncodeTiled"));
    assert_eq!(calls("cuLaunchKernel"), 2);
    Ok(())
}

/// A backward launches its kernels as its forward did: early or in turn.
fn set_kernels_before_a_backward(device: &Device) -> Result<()> {
    if available_kernels(device).len() < 2 {
        return Ok(()); // no kernels that begin early
    }
    let tensor =
        |seed, shape: &[usize]| random(seed, shape).to_dtype(DType::BF16)?.to_device(device);
    let (x, weight) = (Var::from_tensor(&tensor(1, &[1793, 64])?)?, tensor(2, &[1152, 64])?);
    let (a, b) = (tensor(3, &[8, 64])?, tensor(4, &[1152, 8])?);
    let lora = Lora { a: &a, b: &b, b_bias: None, scaling: 1.0, dropout: None };
    let part = Projection { weight: &weight, scales: None, bias: None, lora: Some(lora) };
    let early = || calls("CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC").unwrap_or_default();
    for (forward, backward, expected) in
        [(Kernels::Native, Kernels::NativeInTurn, 1), (Kernels::NativeInTurn, Kernels::Native, 0)]
    {
        let before = early();
        set_kernels(forward);
        let y = ops::lora_linear(&x, &part, Activation::Identity, None)?;
        let between = early();
        set_kernels(backward);
        let done = y.sum_all()?.backward();
        set_kernels(Kernels::default());
        done?;
        let launched = [between - before, early() - between];
        assert_eq!(launched, [expected; 2], "{forward:?}, then {backward:?}");
    }
    Ok(())
}
