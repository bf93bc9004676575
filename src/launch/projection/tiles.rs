//! The tiles of the projections' kernels for every GPU and of their thin products (`kernels/tiles.h`), and which ones a
//! problem gets.

use crate::launch::tile_table::{LOW_RANK, PROJECTION};
use crate::launch::Gpu;
use candle_core::{bail, DType, Result};

pub use super::tile::{LowRankTile, Product, Tile};

/// All tiles, the largest first; for tests.
pub const TILES: &[Tile] = PROJECTION;

/// The tile for an output of `rows` rows in these widths: the first that is not too wide and makes enough blocks, else
/// the last. Too few blocks leave multiprocessors idle.
pub fn pick(rows: u64, widths: &[u64], gpu: &Gpu) -> &'static Tile {
    let serves = |tile: &&Tile| {
        // A width that fills at most half of the last tile wastes more than a smaller tile costs.
        let narrow = widths.iter().all(|width| 2 * width <= tile.cols.into());
        !narrow && tile.row_blocks(rows) * tile.columns(widths) >= gpu.enough_blocks()
    };
    PROJECTION.iter().find(serves).unwrap_or(&PROJECTION[PROJECTION.len() - 1])
}

impl LowRankTile {
    /// Rows.
    pub const ROWS: u64 = 64;

    /// The narrowest tile that takes a rank at once; the widest, where none does.
    ///
    /// # Errors
    /// On dtypes that no kernel takes.
    pub(in crate::launch) fn pick(
        product: Product,
        dtype: DType,
        rank: u32,
    ) -> Result<&'static Self> {
        let bytes = dtype.size_in_bytes();
        let of_product = |tile: &&Self| (tile.product, tile.element_bytes) == (product, bytes);
        let tiles = || LOW_RANK.iter().filter(of_product);
        let fitting = tiles().filter(|tile| tile.cols >= rank).min_by_key(|tile| tile.cols);
        match fitting.or_else(|| tiles().max_by_key(|tile| tile.cols)) {
            Some(tile) => Ok(tile),
            None => bail!("low_rank_{product}: no kernel takes {dtype:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiles_fill_the_device() {
        let [large, small] = TILES else { panic!("{TILES:?}") };
        let tile = |rows, widths: &[u64]| pick(rows, widths, &Gpu::H100);
        // SAM ViT-B's qkv of one image, its output projection, and of one window's worth of tokens.
        assert_eq!(tile(4096, &[768; 3]), large);
        assert_eq!(tile(4096, &[768]), large);
        assert_eq!(tile(196, &[768; 3]), small);
        // Narrow outputs, as of the mask decoder, waste less in small tiles.
        assert_eq!(tile(65536, &[32]), small);
        assert_eq!(tile(65536, &[64; 3]), small);
        assert_eq!(tile(65536, &[128]), large);
        // 120 large blocks are too few for 132 multiprocessors, and enough for 108.
        assert_eq!(tile(15360, &[128]), small);
        assert_eq!(pick(15360, &[128], &Gpu::A100), large);
    }

    #[test]
    fn a_rank_gets_the_narrowest_tile_that_takes_it_at_once() -> Result<()> {
        for product in [Product::Input, Product::Grad, Product::Weight] {
            for (rank, cols) in [(1, 16), (16, 16), (17, 64), (64, 64), (200, 64)] {
                for dtype in [DType::F16, DType::BF16, DType::F32] {
                    let tile = LowRankTile::pick(product, dtype, rank)?;
                    assert_eq!((tile.cols, tile.element_bytes), (cols, dtype.size_in_bytes()));
                }
            }
        }
        assert!(LowRankTile::pick(Product::Input, DType::F64, 16).is_err());
        Ok(())
    }
}
