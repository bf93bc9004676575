//! Which of an operation's implementations run: those for the GPU's own architecture, or the portable ones.
//!
//! For comparing the two, and to get along without one that turns out to be wrong.

use super::context;
use crate::launch::Gpu;
use candle_core::Device;
use std::sync::atomic::{AtomicU8, Ordering};

/// Implementations of the operations on a GPU.
///
/// [Example](crate::cuda)
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernels {
    /// Those for the GPU's own architecture, as far as there are any; else the portable ones.
    #[default]
    Native,
    /// The same, of which none begins before the one before it has ended, as some may on Hopper (programmatic dependent
    /// launch).
    NativeInTurn,
    /// Those that run on every GPU from compute capability 8.0 on.
    Portable,
}

impl Kernels {
    /// The GPU with these of its kernels.
    pub(crate) fn on(self, gpu: Gpu) -> Gpu {
        match self {
            Self::Native => gpu,
            Self::NativeInTurn => gpu.in_turn(),
            Self::Portable => gpu.portable_only(),
        }
    }
}

static CHOICE: AtomicU8 = AtomicU8::new(Kernels::Native as u8);

/// Takes these kernels in every forward from now on, in the whole process. A backward goes on with those of its
/// forward, a graph with those that it was captured with.
///
/// [Example](crate::cuda)
pub fn set_kernels(kernels: Kernels) {
    CHOICE.store(kernels as u8, Ordering::Relaxed);
}

/// The kernels that are taken.
///
/// [Example](crate::cuda)
pub fn kernels() -> Kernels {
    let choice = CHOICE.load(Ordering::Relaxed);
    let all = [Kernels::Native, Kernels::NativeInTurn, Kernels::Portable];
    all.into_iter().find(|&kernels| kernels as u8 == choice).unwrap_or_default()
}

/// The implementations that differ on this device: two on Hopper, one on any other.
///
/// [Example](crate::cuda)
pub fn available_kernels(device: &Device) -> &'static [Kernels] {
    match device {
        Device::Cuda(device) if context::gpu(device).is_some_and(|gpu| gpu.native.is_some()) => {
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
        for choice in [Kernels::Portable, Kernels::NativeInTurn, Kernels::Native] {
            set_kernels(choice);
            assert_eq!(kernels(), choice);
        }
        assert_eq!(available_kernels(&Device::Cpu), [Kernels::Native]);
    }

    #[test]
    fn a_choice_takes_kernels_away() {
        let on = |kernels: Kernels| kernels.on(Gpu::H100);
        assert_eq!(on(Kernels::Native), Gpu::H100);
        assert_eq!(on(Kernels::NativeInTurn), Gpu { early_launch: false, ..Gpu::H100 });
        assert_eq!(on(Kernels::Portable), Gpu { native: None, ..Gpu::H100 });
    }
}
