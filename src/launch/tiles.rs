//! Tiles by argument: those that a self-test or a measurement wants in the place of the ones that the rules pick.
//!
//! The rules are `pick` in the modules `tiles` of the operations, over the table that `kernels/tiles.h` is.

use super::projection::sm90::tile::Tile as ProjectionTile;

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
