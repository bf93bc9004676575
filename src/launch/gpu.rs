//! The GPU as a value: its properties, and the kernels that the build holds for it. Kernels, tiles and grids follow
//! from it, so every choice can be tested on any GPU, without one.

use super::tiles::Forced;

/// An architecture with kernels of its own, in folders of this name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Architecture {
    /// Hopper.
    Sm90,
}

impl Architecture {
    const ALL: [Self; 1] = [Self::Sm90];

    /// The one compute capability that runs its kernels.
    fn capability(self) -> (u32, u32) {
        match self {
            Self::Sm90 => (9, 0),
        }
    }
}

/// A GPU, as far as launches depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Gpu {
    /// Compute capability, major and minor.
    pub capability: (u32, u32),
    /// Number of multiprocessors, at least one.
    pub multiprocessors: u32,
    /// Bytes of shared memory that a block may opt into.
    pub shared_bytes: usize,
    /// Whether it launches clusters of blocks.
    pub clusters: bool,
    /// Whether a kernel may begin before the previous one has ended (programmatic dependent launch).
    pub early_launch: bool,
    /// Whether it runs the portable kernels of this build.
    pub portable: bool,
    /// The architecture whose own kernels may be used.
    pub native: Option<Architecture>,
    /// Tiles in the place of those that the rules pick.
    pub forced: Forced,
}

impl Gpu {
    /// An A100, for tests.
    pub const A100: Self = Self {
        capability: (8, 0),
        multiprocessors: 108,
        shared_bytes: 163 << 10,
        clusters: false,
        early_launch: false,
        portable: true,
        native: None,
        forced: Forced::NONE,
    };

    /// An H100 or H200 with all kernels, for tests.
    pub const H100: Self = Self {
        capability: (9, 0),
        multiprocessors: 132,
        shared_bytes: 227 << 10,
        clusters: true,
        early_launch: true,
        portable: true,
        native: Some(Architecture::Sm90),
        forced: Forced::NONE,
    };

    /// The same GPU with the kernels of a build: `compiled` lists its compute capabilities, sorted, as 80 for 8.0.
    pub fn with_kernels(self, compiled: &[u32]) -> Self {
        let number = |(major, minor): (u32, u32)| 10 * major + minor;
        // Newer devices translate the PTX of the oldest one.
        let covered = compiled.first().is_some_and(|&oldest| oldest <= number(self.capability));
        let held = |architecture: &Architecture| {
            let capability = architecture.capability();
            capability == self.capability && compiled.contains(&number(capability))
        };
        Self {
            portable: covered && self.capability >= (8, 0),
            native: Architecture::ALL.into_iter().find(held),
            ..self
        }
    }

    /// Whether devices of this capability launch kernels early. Drivers for CUDA 12.3 (12030) and newer keep the
    /// permission as an edge of a graph where launches are captured.
    pub fn launches_early(capability: (u32, u32), driver: i32) -> bool {
        capability >= (9, 0) && driver >= 12_030
    }

    /// The same GPU with portable kernels alone.
    pub fn portable_only(self) -> Self {
        Self { native: None, ..self }
    }

    /// The same GPU with every kernel waiting for the previous one to end.
    pub fn in_turn(self) -> Self {
        Self { early_launch: false, ..self }
    }

    /// Blocks that keep the multiprocessors busy, up to 3 % of them.
    pub(super) fn enough_blocks(&self) -> u64 {
        u64::from(self.multiprocessors) * 97 / 100
    }

    /// Blocks of a kernel whose blocks stay, one on each multiprocessor, and take turns at the work.
    pub(super) fn persistent_blocks(&self) -> u64 {
        self.multiprocessors.into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_build_has_kernels_for_its_capabilities_and_newer_devices() {
        let built = |capability, compiled: &[u32]| {
            let gpu = Gpu { capability, ..Gpu::A100 }.with_kernels(compiled);
            (gpu.portable, gpu.native)
        };
        let sm90 = Some(Architecture::Sm90);
        assert_eq!(built((8, 0), &[80, 90]), (true, None));
        assert_eq!(built((9, 0), &[80, 90]), (true, sm90));
        assert_eq!(built((9, 0), &[90]), (true, sm90));
        // Hopper's kernels run on Hopper alone, and only if they were compiled.
        assert_eq!(built((9, 0), &[80]), (true, None));
        assert_eq!(built((10, 0), &[80, 90]), (true, None));
        assert_eq!(built((12, 0), &[90]), (true, None));
        for (older, compiled) in [((7, 5), &[80, 90][..]), ((8, 0), &[86]), ((8, 6), &[])] {
            assert_eq!(built(older, compiled), (false, None), "{older:?}");
        }
        assert!(!built((7, 5), &[70]).0, "no kernel is for devices before 8.0");
    }

    #[test]
    fn kernels_begin_early_where_devices_and_graphs_know_it() {
        assert!(Gpu::launches_early((9, 0), 12_030) && Gpu::launches_early((10, 0), 13_000));
        assert!(!Gpu::launches_early((8, 9), 13_000) && !Gpu::launches_early((9, 0), 12_020));
    }

    #[test]
    fn numbers_of_blocks_follow_the_multiprocessors() {
        for (multiprocessors, enough) in [(132, 128), (108, 104), (78, 75), (4, 3)] {
            let gpu = Gpu { multiprocessors, ..Gpu::H100 };
            assert_eq!(gpu.enough_blocks(), enough, "{multiprocessors}");
            assert_eq!(gpu.persistent_blocks(), u64::from(multiprocessors));
        }
    }
}
