//! A key tile of the attention's kernels for every GPU.

use crate::launch::AttentionProblem;
use std::ops::RangeInclusive;

/// Scales of scores by which a bias can be divided, without an overflow and without a loss.
const DIVISORS: RangeInclusive<f32> = 1e-6..=1e6;

/// A key tile: `rows` key rows by `cols` columns, for blocks of 16 queries a warp. Its rows are whole rows of the
/// window or whole stretches of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// Bytes of an element.
    pub element_bytes: usize,
    /// Channels: head_dim rounded up.
    pub head_dim: usize,
    /// Columns.
    pub cols: usize,
    /// Key rows.
    pub rows: usize,
    /// Warps of a block.
    pub warps: usize,
    /// Sixteens of queries that a warp of the forward has. Its tiles have so many times the rows, and as many times
    /// fewer columns.
    pub parts: usize,
    /// Shared memory of a block of the forward, without the biases.
    pub forward_bytes: usize,
    /// That of the backward's query pass.
    pub backward_bytes: usize,
}

/// Keys and values of a block of the backward's key pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyTile {
    /// Bytes of an element.
    pub element_bytes: usize,
    /// Channels: head_dim rounded up.
    pub head_dim: usize,
    /// Shared memory of a block.
    pub bytes: usize,
}

impl Tile {
    /// Queries of a block of the query pass.
    pub fn queries(&self) -> usize {
        16 * self.warps
    }

    /// Whether there is a forward for a problem. With several parts, its products are added to rel_w divided by the
    /// scale. And it has rel_h of more queries, which must not take more shared memory than the query pass.
    pub fn takes(&self, problem: &AttentionProblem) -> bool {
        let bytes = [self.forward_shared_bytes(problem), self.backward_shared_bytes(problem)];
        self.parts == 1 || DIVISORS.contains(&problem.softmax_scale) && bytes[0] <= bytes[1]
    }

    /// Blocks of queries of all heads of all windows, in the query pass.
    pub fn blocks(&self, problem: &AttentionProblem) -> u64 {
        blocks(problem, self.queries())
    }

    /// The forward's.
    pub fn forward_blocks(&self, problem: &AttentionProblem) -> u64 {
        blocks(problem, self.parts * self.queries())
    }

    /// The instance of a family of kernels, without the dtype.
    pub fn instance(&self, family: &str) -> String {
        format!("{family}_hd{}_cols{}", self.head_dim, self.cols)
    }

    /// Shared memory of a block of the forward. It has rel_w in registers.
    pub fn forward_shared_bytes(&self, problem: &AttentionProblem) -> usize {
        let [h, _] = bias_strides(problem, self.parts * self.rows, self.cols / self.parts);
        self.forward_bytes + 4 * self.parts * self.queries() * h
    }

    /// Shared memory of a block of the query pass. The gradients of rel_h need a place of their own if there are
    /// several stripes.
    pub fn backward_shared_bytes(&self, problem: &AttentionProblem) -> usize {
        let [h, w] = bias_strides(problem, self.rows, self.cols);
        let gradients = if problem.side_w <= self.cols { 0 } else { h };
        self.backward_bytes + 4 * self.queries() * (h + w + gradients)
    }
}

/// Blocks of so many queries of all heads of all windows.
fn blocks(problem: &AttentionProblem, queries: usize) -> u64 {
    let units = problem.windows() * problem.num_heads;
    units as u64 * problem.tokens().div_ceil(queries) as u64
}

/// Floats of a query's rel_h and rel_w beside key tiles of so many rows and columns, as `Biases` in
/// `kernels/rel_pos_attention/common.cuh` lays them out.
pub(in crate::launch) fn bias_strides(
    problem: &AttentionProblem,
    rows: usize,
    cols: usize,
) -> [usize; 2] {
    [problem.side_h.next_multiple_of(rows) | 1, problem.side_w.next_multiple_of(cols) + 8]
}
