//! Large images in tiles: memory for one tile, whatever the image's size.
//!
//! ```text
//! cores      equal parts of the image, no side longer than `tile`; together they are the image
//! window     a core and `halo` pixels around it, within the image: what is read and segmented at a time
//! stitch     views of one object in several windows become one mask, see stitch.rs
//! ```

use super::stitch::Stitcher;
use super::{Crop, Generated, GeneratedMask, GenerationStatistics, MaskGenerator, Tile};
use crate::sam::{LargeImage, SamPredictor};
use crate::{Error, Result};
use image::DynamicImage;

/// More than tiles of a useful size in any image, and few enough to list.
const MOST_TILES: u64 = 1 << 20;

/// How an image is cut into tiles.
///
/// [Example](crate::guide::everything)
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tiling {
    /// The longest side of a core, in pixels.
    pub tile: u32,
    /// Pixels around a core that its window has too. Objects are found best if none is wider than twice the halo.
    pub halo: u32,
    /// Masks of two windows are one object if their IoU, where both windows know them, is at least this.
    pub same_object_iou: f64,
}

impl Default for Tiling {
    /// Windows of at most 1280 pixels.
    fn default() -> Self {
        Self { tile: 1024, halo: 128, same_object_iou: 0.5 }
    }
}

impl Tiling {
    /// The tiles of an image of a height and width, row by row. An image no larger than `tile` is one tile.
    ///
    /// # Errors
    /// - `tile` is 0, or `same_object_iou` is not above 0 and at most 1;
    /// - the image has no pixel, or 2^32 or more;
    /// - there are more than 2^20 tiles.
    pub fn tiles(&self, (height, width): (u32, u32)) -> Result<Vec<Tile>> {
        let refuse = |message: String| Err(Error::Config(format!("tiles: {message}")));
        if self.tile == 0 {
            return refuse("tile is 0".into());
        }
        if !(self.same_object_iou > 0.0 && self.same_object_iou <= 1.0) {
            let iou = self.same_object_iou;
            return refuse(format!("same_object_iou is {iou}, expected above 0 and at most 1"));
        }
        let pixels = u64::from(height) * u64::from(width);
        if !(1..=u64::from(u32::MAX)).contains(&pixels) {
            let message = format!("an image of {width} x {height} pixels, expected 1 to 2^32 - 1");
            return refuse(message);
        }
        let (rows, columns) = (height.div_ceil(self.tile), width.div_ceil(self.tile));
        if u64::from(rows) * u64::from(columns) > MOST_TILES {
            let tile = self.tile;
            return refuse(format!(
                "tile is {tile}: an image of {width} x {height} pixels would have {columns} x {rows} tiles, expected at \
                 most {MOST_TILES}"
            ));
        }
        let (rows, columns) = (self.parts(height), self.parts(width));
        let tile = |&(top, bottom): &(u32, u32), &(left, right): &(u32, u32)| Tile {
            core: Crop { left, top, right, bottom },
            window: Crop {
                left: left.saturating_sub(self.halo),
                top: top.saturating_sub(self.halo),
                right: right.saturating_add(self.halo).min(width),
                bottom: bottom.saturating_add(self.halo).min(height),
            },
        };
        Ok(rows
            .iter()
            .flat_map(|row| columns.iter().map(move |column| tile(row, column)))
            .collect())
    }

    /// A side in as few parts as possible, as equal as possible.
    fn parts(&self, side: u32) -> Vec<(u32, u32)> {
        let count = u64::from(side.div_ceil(self.tile));
        let edge = |part: u64| (u64::from(side) * part / count) as u32;
        (0..count).map(|part| (edge(part), edge(part + 1))).collect()
    }

    /// The masks of a large image: `segment` gives those of each window, in the window's size; they are stitched.
    ///
    /// An image of one tile gives the masks of `segment` unchanged. Masks come in the order of their first tile. Memory
    /// is that of one window, of what `segment` needs for it, and of the run lengths found.
    ///
    /// # Errors
    /// - as [`tiles`](Self::tiles) and [`LargeImage::region`];
    /// - `segment` fails, or a mask is not of the window's size.
    pub fn segment(
        &self,
        image: &mut LargeImage,
        mut segment: impl FnMut(&DynamicImage, &Tile) -> Result<Vec<GeneratedMask>>,
    ) -> Result<Vec<GeneratedMask>> {
        let tiles = self.tiles(image.size())?;
        if let [tile] = &tiles[..] {
            return segment(&image.region(&tile.window)?, tile);
        }
        let mut stitcher = Stitcher::new(image.size(), self.same_object_iou);
        for tile in &tiles {
            let masks = segment(&image.region(&tile.window)?, tile)?;
            stitcher.add(tile, masks)?;
        }
        Ok(stitcher.finish())
    }
}

impl MaskGenerator {
    /// The masks of everything in a large image, tile by tile; `progress` hears of tiles done and of all.
    ///
    /// # Errors
    /// - as [`Tiling::segment`] and [`generate`](Self::generate).
    pub fn generate_tiled(
        &self,
        predictor: &SamPredictor<'_>,
        image: &mut LargeImage,
        tiling: &Tiling,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Generated> {
        let (mut done, total) = (0, tiling.tiles(image.size())?.len());
        let mut statistics = GenerationStatistics::default();
        let masks = tiling.segment(image, |part, _| {
            let found = self.generate_counted(predictor, part, |_, _| {})?;
            statistics += &found.statistics;
            done += 1;
            progress(done, total);
            Ok(found.masks)
        })?;
        statistics.united = statistics.masks - masks.len();
        statistics.masks = masks.len();
        Ok(Generated { masks, statistics })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cores_part_the_image() -> Result<()> {
        for (size, tile, halo) in [((70, 33), 16, 5), ((1, 90), 7, 100), ((64, 64), 64, 9)] {
            let tiles = Tiling { tile, halo, ..Tiling::default() }.tiles(size)?;
            let mut seen = vec![0; (size.0 * size.1) as usize];
            for Tile { core, window } in &tiles {
                assert!(core.width().max(core.height()) <= tile);
                assert!(window.left <= core.left && core.right <= window.right);
                assert!(window.right <= size.1 && window.bottom <= size.0);
                for y in core.top..core.bottom {
                    (core.left..core.right).for_each(|x| seen[(y * size.1 + x) as usize] += 1);
                }
            }
            assert!(seen.iter().all(|count| *count == 1), "{size:?}");
        }
        assert_eq!(Tiling::default().tiles((1024, 7))?.len(), 1);
        Ok(())
    }

    #[test]
    fn impossible_tilings_are_refused() {
        let usual = Tiling::default();
        for (tiling, size, words) in [
            (Tiling { tile: 0, ..usual }, (9, 9), "tile is 0"),
            (Tiling { same_object_iou: f64::NAN, ..usual }, (9, 9), "same_object_iou"),
            (usual, (0, 9), "9 x 0 pixels"),
            (usual, (1 << 16, 1 << 16), "2^32"),
            (Tiling { tile: 1, ..usual }, (1 << 15, 1 << 16), "65536 x 32768 tiles"),
        ] {
            let error = tiling.tiles(size).expect_err("accepted").to_string();
            assert!(error.contains(words), "{error}");
        }
    }
}
