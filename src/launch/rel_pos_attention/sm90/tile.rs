//! A key tile of the attention's kernels for Hopper.

use crate::launch::rel_pos_attention::tile::bias_strides;
use crate::launch::AttentionProblem;

/// Shared memory that a block may have on Hopper.
pub(in crate::launch) const SHARED_BYTES: usize = 227 << 10;

/// A key tile of whole rows of `cols` columns, for a block of queries that it streams past: the forward, and the
/// backward's query pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct StreamTile {
    /// Channels of a head.
    pub head_dim: usize,
    /// Columns.
    pub cols: usize,
    /// Key rows.
    pub rows: usize,
    /// Grid rows that one bulk copy brings.
    pub box_rows: usize,
    /// Queries of a block.
    pub queries: usize,
    /// Threads of a block.
    pub threads: u32,
    /// Shared memory of a block, without the biases.
    pub bytes: usize,
}

/// The keys that a block of the backward's key pass has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyBlock {
    /// Channels of a head.
    pub head_dim: usize,
    /// Columns.
    pub cols: usize,
    /// Shared memory of a block.
    pub bytes: usize,
}

/// A window that lies whole in a block's shared memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowTile {
    /// Channels of a head.
    pub head_dim: usize,
    /// Shared memory of a block of the forward.
    pub forward_bytes: usize,
    /// That of the backward.
    pub backward_bytes: usize,
}

impl StreamTile {
    /// Floats of a query's rel_h and rel_w.
    pub fn bias_strides(&self, problem: &AttentionProblem) -> [usize; 2] {
        bias_strides(problem, self.rows, self.cols)
    }

    /// Shared memory of a block of the forward, with the biases.
    pub(in crate::launch) fn forward_bytes(&self, problem: &AttentionProblem) -> usize {
        let [h, w] = self.bias_strides(problem);
        self.bytes + 4 * self.queries * (h + w)
    }
}
