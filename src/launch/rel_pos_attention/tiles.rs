//! The key tiles of the attention's kernels for every GPU (`kernels/tiles.h`), and which one a problem gets.

use crate::launch::tile_table::{ATTENTION, ATTENTION_KEY};
use crate::launch::AttentionProblem;
use candle_core::DType;

pub use super::tile::{KeyTile, Tile};

impl Tile {
    /// The tile of the key pass beside this one.
    pub fn key_tile(&self) -> Option<&'static KeyTile> {
        let beside = |tile: &&KeyTile| {
            (tile.element_bytes, tile.head_dim) == (self.element_bytes, self.head_dim)
        };
        ATTENTION_KEY.iter().find(beside)
    }
}

/// The tiles that there are kernels for; none for other dtypes than f32, f16 and bf16, and for larger heads.
pub fn candidates(
    problem: &AttentionProblem,
    dtype: DType,
) -> impl Iterator<Item = &'static Tile> + Clone {
    let element_bytes = match dtype {
        DType::F32 | DType::F16 | DType::BF16 => dtype.size_in_bytes(),
        _ => 0,
    };
    let head_dims = ATTENTION.iter().map(|tile| tile.head_dim);
    let head_dim = head_dims.filter(|dim| *dim >= problem.head_dim).min();
    ATTENTION
        .iter()
        .filter(move |tile| tile.element_bytes == element_bytes && Some(tile.head_dim) == head_dim)
}

/// The tile of a problem. It is the one of `cols` columns, if given and present, else the one that wastes the fewest
/// columns of the window.
pub fn pick(
    problem: &AttentionProblem,
    dtype: DType,
    cols: Option<usize>,
) -> Option<&'static Tile> {
    let tiles = candidates(problem, dtype).filter(|tile| tile.takes(problem));
    by_width(tiles, problem.side_w, cols, |tile| tile.cols)
}

/// The tile of `cols` columns, or the first of those whose stripes leave least of `width` empty.
pub(in crate::launch) fn by_width<T>(
    tiles: impl Iterator<Item = &'static T> + Clone,
    width: usize,
    cols: Option<usize>,
    cols_of: impl Fn(&T) -> usize,
) -> Option<&'static T> {
    let wanted = tiles.clone().find(|tile| Some(cols_of(tile)) == cols);
    wanted.or_else(|| tiles.min_by_key(|tile| width.next_multiple_of(cols_of(tile))))
}

#[cfg(test)]
mod tests {
    use super::super::portable::tests::GLOBAL;
    use super::*;

    #[test]
    fn the_tile_leaves_least_of_the_width_empty() {
        let tile = |side_w, dtype, head_dim| {
            let problem = AttentionProblem { side_w, head_dim, ..GLOBAL };
            let tile = pick(&problem, dtype, None).unwrap();
            (tile.head_dim, tile.cols, tile.rows, tile.warps)
        };
        let (wide, narrow, middle) = ((64, 64, 1, 4), (64, 16, 4, 7), (64, 40, 2, 4));
        for (width, expected) in [
            (14, narrow),
            (32, narrow),
            (48, narrow),
            (80, narrow),
            (37, middle),
            (40, middle),
            (50, wide),
            (64, wide),
            (128, wide),
        ] {
            for dtype in [DType::F16, DType::BF16] {
                assert_eq!(tile(width, dtype, 64), expected, "{width}");
            }
        }
        assert_eq!(tile(64, DType::F32, 64), (64, 16, 2, 4));
        for (head_dim, rounded_up) in [(1, 16), (14, 16), (32, 32), (33, 64), (80, 80)] {
            assert_eq!(tile(14, DType::BF16, head_dim).0, rounded_up);
        }
        // Small heads have the narrow tile alone.
        assert_eq!(tile(64, DType::BF16, 32).1, 16);
        assert_eq!(pick(&AttentionProblem { head_dim: 81, ..GLOBAL }, DType::F16, None), None);
        assert_eq!(pick(&GLOBAL, DType::F64, None), None);
    }

    #[test]
    fn a_tile_of_two_parts_needs_a_divisor_and_room() {
        let problem = AttentionProblem { side_w: 56, ..GLOBAL };
        let cols = |problem| pick(&problem, DType::BF16, None).map(|tile| tile.cols);
        assert_eq!(cols(problem), Some(64));
        for softmax_scale in [0.0, -0.125, 1e-7, f32::INFINITY, f32::NAN] {
            assert_eq!(cols(AttentionProblem { softmax_scale, ..problem }), Some(16));
        }
        // With many rows, rel_h of twice the queries takes more than rel_h and rel_w of the query pass.
        assert_eq!(cols(AttentionProblem { side_h: 200, ..problem }), Some(16));
    }

    #[test]
    fn a_forced_tile_is_taken_where_it_exists() {
        let cols = |dtype, cols| pick(&GLOBAL, dtype, Some(cols)).map(|tile| tile.cols);
        assert_eq!(cols(DType::BF16, 40), Some(40));
        assert_eq!(cols(DType::F32, 40), Some(16));
        assert_eq!(cols(DType::BF16, 41), Some(64));
    }

    #[test]
    fn every_tile_has_its_key_pass() {
        assert!(ATTENTION.iter().all(|tile| tile.key_tile().is_some()));
        for tile in ATTENTION {
            assert_eq!((tile.cols % 8, tile.rows * tile.cols % 16), (0, 0), "{tile:?}");
        }
    }
}
