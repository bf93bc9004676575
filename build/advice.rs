//! Where a compiler is known to make slower or doubtful kernels: one warning, so that nobody measures them unaware. The
//! table is in docs/cuda.md.

/// A release of CUDA.
pub type Release = (u32, u32);

/// The known faults of this release, with or without kernels for Hopper.
pub fn advice((major, minor): Release, hopper: bool) -> Option<String> {
    let mut known = Vec::new();
    if hopper && (major, minor) < (12, 9) {
        known.push(
            "ptxas serialises wgmma, so that Hopper's kernels run at less than half their speed",
        );
    }
    if hopper && (major, minor) < (13, 1) {
        known.push(
            "Hopper's attention backward reads keys from shared memory, since ptxas overwrites them in \
             registers",
        );
    }
    if ((12, 8)..(13, 3)).contains(&(major, minor)) {
        known.push("ptxas may corrupt registers where branches diverge in two nested levels");
    }
    let known = known.join("; ");
    (!known.is_empty()).then(|| {
        format!("CUDA {major}.{minor}: {known}. CUDA 13.3 or newer is free of this (docs/cuda.md)")
    })
}
