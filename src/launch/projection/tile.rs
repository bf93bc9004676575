//! A tile of the projections' kernels for every GPU, and of their thin products.

use std::fmt;

/// The output tile of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory of a block of the forward.
    pub forward_bytes: u32,
    /// That of the gradient of x.
    pub backward_bytes: u32,
}

impl fmt::Display for Tile {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}x{}", self.rows, self.cols)
    }
}

impl Tile {
    /// Blocks beside each other for an output in these widths.
    pub(in crate::launch) fn columns(&self, widths: &[u64]) -> u64 {
        widths.iter().map(|width| width.div_ceil(self.cols.into())).sum()
    }

    /// Blocks below each other.
    pub(in crate::launch) fn row_blocks(&self, rows: u64) -> u64 {
        rows.div_ceil(self.rows.into())
    }
}

/// A product with a thin f32 side (`kernels/low_rank/low_rank.cuh`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Product {
    /// S, of x and A.
    Input,
    /// dS, of the gradient and B.
    Grad,
    /// The gradients of A and B.
    Weight,
}

impl fmt::Display for Product {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Input => "input",
            Self::Grad => "grad",
            Self::Weight => "weight",
        })
    }
}

/// The output tile of a block of a thin product: 64 rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LowRankTile {
    /// The product that it belongs to.
    pub product: Product,
    /// Columns.
    pub cols: u32,
    /// Bytes of an element of the left side.
    pub element_bytes: usize,
    /// Shared memory of a block.
    pub bytes: u32,
}
