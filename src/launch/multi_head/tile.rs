//! A tile of the kernels for attention between two sets of tokens.

/// The rows that a block holds, and the columns of a tile that streams past them. Rows are queries and columns keys; in
/// the backward's key pass it is the other way round.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Bytes of an element.
    pub element_bytes: usize,
    /// Channels: head_dim rounded up.
    pub head_dim: usize,
    /// Rows: 16 a warp.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// Shared memory of a block of the forward.
    pub forward_bytes: u32,
    /// That of both passes of the backward.
    pub backward_bytes: u32,
}

impl Tile {
    /// Warps of a block.
    pub fn warps(&self) -> u32 {
        self.rows as u32 / 16
    }

    /// The instance of a family of kernels, without the dtype.
    pub fn instance(&self, family: &str) -> String {
        format!("{family}_hd{}_{}x{}", self.head_dim, self.rows, self.columns)
    }
}
