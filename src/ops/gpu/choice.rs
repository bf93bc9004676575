//! The implementation that computes a problem on a GPU: the one place where this is decided, before an operation's forward and for its
//! backward too.

use super::self_test;
use crate::driver::{self, Kernels};
use crate::launch::family::{Family, Implementation};
use crate::launch::projection::sm90::forward::Hopper;
use crate::launch::self_test::Choice;
use candle_core::{CudaDevice, DType, Result};

/// The implementation that computes a problem of this family; none if the composed graph does. The first problem of a family and dtype
/// on a device waits for the family's self-test. A capture cannot wait, so in one a family that was never tested is not
/// used: the portable kernels are.
pub fn implementation(
    device: &CudaDevice,
    dtype: DType,
    family: impl FnOnce(Hopper) -> Option<Family>,
) -> Result<Option<Implementation>> {
    let hopper = match driver::kernels() {
        Kernels::Portable => None,
        Kernels::Native | Kernels::NativeInTurn => driver::hopper(device),
    };
    let native = hopper.and_then(|hopper| Some((hopper, family(hopper)?)));
    let Some((hopper, family)) = native else { return Ok(Some(Implementation::Portable)) };
    let choice = match driver::tested(device, (family, dtype))? {
        Some(choice) => choice,
        None if !driver::self_test_is_on() => Choice::Native,
        None if driver::is_capturing(device) => Choice::Portable,
        None => self_test::first_use(device, (family, dtype), hopper)?,
    };
    Ok(match choice {
        Choice::Native => Some(Implementation::Native(hopper)),
        Choice::Portable => Some(Implementation::Portable),
        Choice::Composed => None,
    })
}
