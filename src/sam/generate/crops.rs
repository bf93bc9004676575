//! Where the model looks: the image, overlapping crops of it, and a grid of points in each.

/// A part of the image, its sides in pixels, `right` and `bottom` beyond the last.
///
/// [Example](crate::sam::label_image)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Crop {
    /// The first column.
    pub left: u32,
    /// The first row.
    pub top: u32,
    /// After the last column.
    pub right: u32,
    /// After the last row.
    pub bottom: u32,
}

impl Crop {
    /// In pixels; 0 where `right` is not beyond `left`.
    pub fn width(&self) -> u32 {
        self.right.saturating_sub(self.left)
    }

    /// In pixels; 0 where `bottom` is not beyond `top`.
    pub fn height(&self) -> u32 {
        self.bottom.saturating_sub(self.top)
    }

    /// Corners `[x0, y0, x1, y1]`.
    pub(super) fn corners(&self) -> [u32; 4] {
        [self.left, self.top, self.right, self.bottom]
    }
}

/// A part of an image that is segmented at a time.
///
/// [Example](crate::guide::everything)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tile {
    /// The part that no other tile has.
    pub core: Crop,
    /// The core and its halo: the part that is read.
    pub window: Crop,
}

/// The image and, for each layer n from 1, its `4^n` crops, each with its layer.
///
/// Neighbours overlap by `overlap_ratio` of the short side in layer 1, and by half as much in each further one.
///
/// Source: `_generate_per_layer_crops` in `image_processing_sam.py`.
pub(super) fn crops(
    (height, width): (u32, u32),
    layers: u32,
    overlap_ratio: f64,
) -> Vec<(Crop, u32)> {
    let mut all = vec![(Crop { left: 0, top: 0, right: width, bottom: height }, 0)];
    for layer in 1..=layers {
        let count = 1u32 << layer;
        let short = f64::from(height.min(width));
        let overlap = (overlap_ratio * short * (2.0 / f64::from(count))) as u32;
        let side = |whole: u32| (overlap * (count - 1) + whole).div_ceil(count);
        let (wide, high) = (side(width), side(height));
        for column in 0..count {
            for row in 0..count {
                let (left, top) = ((wide - overlap) * column, (high - overlap) * row);
                let (right, bottom) = ((left + wide).min(width), (top + high).min(height));
                // Crops of an image of few pixels may lie beyond it.
                if left < right && top < bottom {
                    all.push((Crop { left, top, right, bottom }, layer));
                }
            }
        }
    }
    all
}

/// The centres of `count * count` equal cells of a crop, row by row, as (x, y) in pixels of the crop.
pub(super) fn grid(count: usize, crop: &Crop) -> Vec<[f32; 2]> {
    let centre = |index: usize| (index as f64 + 0.5) / count as f64;
    let (width, height) = (f64::from(crop.width()), f64::from(crop.height()));
    let cells = (0..count).flat_map(|row| (0..count).map(move |column| (row, column)));
    cells.map(|(row, x)| [(centre(x) * width) as f32, (centre(row) * height) as f32]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn crops_cover_the_image_and_overlap() {
        for (size, layers) in [((60, 100), 2), ((7, 5), 3), ((1, 1), 1), ((1000, 3), 2)] {
            let all = crops(size, layers, 512.0 / 1500.0);
            assert_eq!(all[0].0.corners(), [0, 0, size.1, size.0]);
            for layer in 1..=layers {
                let mut seen = vec![false; (size.0 * size.1) as usize];
                for (crop, _) in all.iter().filter(|(_, of)| *of == layer) {
                    assert!(crop.right <= size.1 && crop.bottom <= size.0);
                    for y in crop.top..crop.bottom {
                        for x in crop.left..crop.right {
                            seen[(y * size.1 + x) as usize] = true;
                        }
                    }
                }
                assert!(seen.iter().all(|seen| *seen), "{size:?}, layer {layer}");
            }
        }
    }

    #[test]
    fn points_are_centres_of_cells() {
        let crop = Crop { left: 10, top: 20, right: 50, bottom: 40 };
        assert_eq!(grid(2, &crop), [[10.0, 5.0], [30.0, 5.0], [10.0, 15.0], [30.0, 15.0]]);
    }
}
