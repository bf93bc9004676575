//! A tile of the projections' kernels for Hopper.

/// How the two warpgroups that multiply share the tiles.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Schedule {
    /// They take tiles in turn, so that one's epilogue runs beside the other's products.
    PingPong,
    /// They share each tile's rows.
    Cooperative,
}

/// A tile of the output that a block makes at a time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Tile {
    /// As the kernels' names have it.
    pub name: &'static str,
    /// How warpgroups share it.
    pub schedule: Schedule,
    /// Rows.
    pub rows: u32,
    /// Columns.
    pub cols: u32,
    /// Blocks of a cluster, which make tiles of the same columns, one below the other, and load the weights once.
    pub cluster: u32,
    /// Shared memory of a block.
    pub bytes: u32,
}

impl Tile {
    pub(in crate::launch) fn columns(&self, widths: &[u32]) -> u64 {
        widths.iter().map(|width| u64::from(width.div_ceil(self.cols))).sum()
    }

    /// Tiles of an output of so many rows in these widths, those that a cluster makes together counted once. The last
    /// ones may lie partly, those of a cluster's later blocks entirely below it.
    pub(in crate::launch) fn count(&self, rows: u64, widths: &[u32]) -> u64 {
        rows.div_ceil((self.cluster * self.rows).into()) * self.columns(widths)
    }
}
