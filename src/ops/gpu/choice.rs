//! The kernels that compute a problem on a GPU: the one place where this is decided, before an operation's forward and
//! for its backward too.

use super::self_test;
use crate::driver;
use crate::launch::family::Family;
use crate::launch::self_test::Choice;
use crate::launch::Gpu;
use candle_core::{CudaDevice, DType, Result};

/// The GPU with the kernels that compute a problem; none if the composed graph does. `covered` is none where no kernel
/// computes it, else the native family that does.
///
/// The first problem of a family and dtype on a device waits for the family's self-test. A capture cannot wait, so in
/// one a family that was never tested is not used: the portable kernels are.
pub fn gpu(
    device: &CudaDevice,
    dtype: DType,
    covered: impl FnOnce(&Gpu) -> Option<Option<Family>>,
) -> Result<Option<Gpu>> {
    let Some(own) = driver::gpu(device) else { return Ok(None) };
    let gpu = driver::kernels().on(own);
    let family = match covered(&gpu) {
        None => return Ok(None),
        Some(None) => return Ok(Some(gpu)),
        Some(Some(family)) => family,
    };
    let choice = match driver::tested(device, (family, dtype))? {
        Some(choice) => choice,
        None if !driver::self_test_is_on() => Choice::Native,
        None if driver::is_capturing(device) => Choice::Portable,
        None => self_test::first_use(device, (family, dtype), own)?,
    };
    Ok(match choice {
        Choice::Native => Some(gpu),
        Choice::Portable => Some(gpu.portable_only()),
        Choice::Composed => None,
    })
}
