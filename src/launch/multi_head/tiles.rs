//! The tiles of the kernels for attention between two sets of tokens (`kernels/tiles.h`), and which one a pass gets.

use crate::launch::tile_table::MULTI_HEAD;
use candle_core::DType;
use std::cmp::Reverse;

pub use super::tile::Tile;

/// The tile with the fewest products for so many rows and columns, and of several the largest. None for other dtypes
/// than f32, f16 and bf16, and for larger heads than any tile's.
pub fn pick(
    (rows, columns): (usize, usize),
    head_dim: usize,
    dtype: DType,
) -> Option<&'static Tile> {
    let element_bytes = match dtype {
        DType::F32 | DType::F16 | DType::BF16 => dtype.size_in_bytes(),
        _ => return None,
    };
    let padded =
        MULTI_HEAD.iter().map(|tile| tile.head_dim).filter(|dim| *dim >= head_dim).min()?;
    let of_kind = |tile: &&Tile| (tile.element_bytes, tile.head_dim) == (element_bytes, padded);
    MULTI_HEAD.iter().filter(of_kind).min_by_key(|tile| {
        let products = rows.next_multiple_of(tile.rows) * columns.next_multiple_of(tile.columns);
        (products, Reverse(tile.rows * tile.columns))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tile_has_the_fewest_products() {
        for dtype in [DType::F32, DType::F16, DType::BF16] {
            for (size, expected) in [
                ((7, 4096), (16, 32)),
                ((16, 4096), (16, 32)),
                ((4096, 7), (64, 16)),
                ((4096, 20), (64, 32)),
                ((448, 4096), (64, 32)),
                ((7, 7), (16, 32)),
                ((1, 1), (16, 32)),
            ] {
                let tile = pick(size, 16, dtype).unwrap();
                assert_eq!((tile.rows, tile.columns), expected, "{size:?}");
            }
        }
    }

    #[test]
    fn heads_are_rounded_up() {
        let head_dim = |dim| pick((7, 7), dim, DType::BF16).map(|tile| tile.head_dim);
        let expected = [Some(16), Some(16), Some(32), Some(32), None];
        assert_eq!([1, 16, 17, 32, 33].map(head_dim), expected);
        assert_eq!(pick((7, 7), 16, DType::F64), None);
    }
}
