//! Tiles by argument: those that a self-test or a measurement wants in the place of the ones that the rules pick.
//!
//! The rules are `pick` in the modules `tiles` of the operations, over the table that `kernels/tiles.h` is.

use super::projection::sm90::tiles::Tile as ProjectionTile;
use std::cell::Cell;

/// Tiles to take where there are kernels of them; a default is the rules' choice.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Forced {
    /// Columns of the attention's key tiles.
    pub attention_cols: Option<usize>,
    /// The tile of the projections' forward on Hopper.
    pub projection_forward: Option<&'static ProjectionTile>,
    /// That of the gradient of x.
    pub projection_backward: Option<&'static ProjectionTile>,
}

impl Forced {
    /// The rules' choice.
    pub const NONE: Self =
        Self { attention_cols: None, projection_forward: None, projection_backward: None };
}

thread_local! {
    static MOST_BLOCKS: Cell<u64> = const { Cell::new(u64::MAX) };
}

/// For self-tests: calls `f` while this thread gives kernels whose blocks take turns at their work at most so many blocks, so
/// that small problems have several turns.
pub fn with_most_blocks<R>(most_blocks: u64, f: impl FnOnce() -> R) -> R {
    struct Restore(u64);
    impl Drop for Restore {
        fn drop(&mut self) {
            MOST_BLOCKS.set(self.0);
        }
    }
    let _restore = Restore(MOST_BLOCKS.replace(most_blocks));
    f()
}

/// The blocks of a kernel whose blocks take turns, of which a device runs so many at once.
pub(super) fn taking_turns(blocks: u32) -> u64 {
    u64::from(blocks).min(MOST_BLOCKS.get())
}
