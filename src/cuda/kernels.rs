//! Which of an operation's implementations run: those for the GPU's own architecture, or the portable ones.
//!
//! For comparing the two, and to get along without one that turns out to be wrong.

use super::{modules, stream};
use candle_core::Device;
use std::sync::atomic::{AtomicBool, Ordering};

/// Implementations of the operations on a GPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernels {
    /// Those for the GPU's own architecture, as far as there are any; else the portable ones.
    #[default]
    Native,
    /// Those that run on every GPU from compute capability 8.0 on.
    Portable,
}

static PORTABLE: AtomicBool = AtomicBool::new(false);

/// Takes these kernels from now on, in the whole process. A graph goes on with those that it was captured with; between
/// a forward and its backward, the choice must stay.
pub fn set_kernels(kernels: Kernels) {
    PORTABLE.store(kernels == Kernels::Portable, Ordering::Relaxed);
}

/// The kernels that are taken.
pub fn kernels() -> Kernels {
    match PORTABLE.load(Ordering::Relaxed) {
        false => Kernels::Native,
        true => Kernels::Portable,
    }
}

/// The implementations that differ on this device: both on Hopper, one on any other.
pub fn available_kernels(device: &Device) -> &'static [Kernels] {
    match device {
        Device::Cuda(device) if stream::capability(device).is_some_and(modules::cover_hopper) => {
            &[Kernels::Native, Kernels::Portable]
        }
        _ => &[Kernels::Native],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_choice_is_kept_and_a_device_without_kernels_of_its_own_has_one() {
        assert_eq!(kernels(), Kernels::default());
        set_kernels(Kernels::Portable);
        assert_eq!(kernels(), Kernels::Portable);
        set_kernels(Kernels::Native);
        assert_eq!(kernels(), Kernels::Native);
        assert_eq!(available_kernels(&Device::Cpu), [Kernels::Native]);
    }
}
