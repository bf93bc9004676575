//! The sizes of SAM's three encoders.

/// Side of the windows.
pub const WINDOW: usize = 14;

/// One of SAM's image encoders.
#[derive(Clone, Copy, Debug)]
pub struct Vit {
    pub name: &'static str,
    pub dim: usize,
    pub heads: usize,
    pub depth: usize,
    pub global: [usize; 4],
}

pub const VIT_B: Vit = Vit { name: "vit_b", dim: 768, heads: 12, depth: 12, global: [2, 5, 8, 11] };
pub const VIT_L: Vit =
    Vit { name: "vit_l", dim: 1024, heads: 16, depth: 24, global: [5, 11, 17, 23] };
pub const VIT_H: Vit =
    Vit { name: "vit_h", dim: 1280, heads: 16, depth: 32, global: [7, 15, 23, 31] };

impl Vit {
    pub fn head_dim(&self) -> usize {
        self.dim / self.heads
    }
}
