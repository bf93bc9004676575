//! Masks of overlapping windows become masks of the image.
//!
//! ```text
//! cut         a mask that touches a side of its window within the image: known inside the window alone
//! complete    any other mask: known everywhere
//! fragment    a mask without a pixel in its tile's core: another tile has the object; dropped
//! views       masks of two windows whose IoU, where both are known, reaches the threshold; the best pairs first,
//!             each mask with at most one of another window, and no two masks of one window in a group
//! result      of a group with complete masks the best of them by predicted IoU; else the union
//! ```
//! Two windows that see an object whole give equal masks, of which one stays: this is the suppression of doubles across
//! tiles. An object that enters a window twice, as two masks, is joined to one of them.

use super::{Crop, GeneratedMask, Tile};
use crate::sam::Rle;
use crate::{Error, Result};

type Size = (u32, u32);

/// A mask in the image, as a window shows it.
struct View {
    mask: GeneratedMask,
    window: Crop,
    cut: bool,
    area: u64,
    tile: usize,
}

/// The masks of the tiles so far.
pub(super) struct Stitcher {
    size: Size,
    same_object_iou: f64,
    views: Vec<View>,
    /// The windows of the tiles, and where their views begin.
    tiles: Vec<(Crop, usize)>,
    /// Places of the views of one object; empty where another group took them.
    groups: Vec<Vec<usize>>,
    /// The group of each view.
    group_of: Vec<usize>,
}

impl Stitcher {
    pub fn new(size: Size, same_object_iou: f64) -> Self {
        let (views, tiles, groups, group_of) = (vec![], vec![], vec![], vec![]);
        Self { size, same_object_iou, views, tiles, groups, group_of }
    }

    /// Adds the masks of a tile.
    ///
    /// # Errors
    /// - a mask is not of the window's size.
    pub fn add(&mut self, tile: &Tile, masks: Vec<GeneratedMask>) -> Result<()> {
        let (index, start) = (self.tiles.len(), self.views.len());
        for mask in masks {
            let expected = (tile.window.height(), tile.window.width());
            if mask.mask.size() != expected {
                let message = "tiles: a mask has (height, width)";
                let found = mask.mask.size();
                return Err(Error::Config(format!("{message} {found:?}, its window {expected:?}")));
            }
            if let Some(view) = View::new(mask, tile, self.size) {
                self.group_of.push(self.groups.len());
                self.groups.push(vec![self.views.len()]);
                self.views.push(View { tile: index, ..view });
            }
        }
        let ends = self.tiles.iter().skip(1).map(|(_, start)| *start).chain([start]);
        let overlapping: Vec<_> = (self.tiles.iter().zip(ends))
            .filter(|((window, _), _)| overlap(window.corners(), tile.window.corners()))
            .map(|((_, from), to)| *from..to)
            .collect();
        for earlier in overlapping {
            self.join(earlier, start);
        }
        self.tiles.push((tile.window, start));
        Ok(())
    }

    /// Joins views of an earlier tile with those from `start` on.
    fn join(&mut self, earlier: std::ops::Range<usize>, start: usize) {
        let mut pairs = vec![];
        for a in earlier {
            for b in start..self.views.len() {
                let iou = self.views[a].iou(&self.views[b]);
                if iou >= self.same_object_iou {
                    pairs.push((iou, a, b));
                }
            }
        }
        pairs.sort_by(|x, y| y.0.total_cmp(&x.0).then((x.1, x.2).cmp(&(y.1, y.2))));
        for (_, a, b) in pairs {
            let (into, from) = (self.group_of[a], self.group_of[b]);
            let tile = |view: &usize| self.views[*view].tile;
            let shared = |view: &usize| self.groups[into].iter().any(|v| tile(v) == tile(view));
            // Covers views that are together already, too: they share their tiles.
            if self.groups[from].iter().any(shared) {
                continue;
            }
            let moved = std::mem::take(&mut self.groups[from]);
            moved.iter().for_each(|view| self.group_of[*view] = into);
            self.groups[into].extend(moved);
        }
    }

    /// A mask for each object, in the order of their first views.
    pub fn finish(self) -> Vec<GeneratedMask> {
        let mut groups: Vec<Vec<usize>> =
            self.groups.into_iter().filter(|group| !group.is_empty()).collect();
        groups.iter_mut().for_each(|group| group.sort_unstable());
        groups.sort_unstable();
        let mut views: Vec<Option<View>> = self.views.into_iter().map(Some).collect();
        let members = groups.into_iter().map(|group| {
            group.into_iter().filter_map(|view| views[view].take()).collect::<Vec<View>>()
        });
        members.collect::<Vec<_>>().into_iter().filter_map(united).collect()
    }
}

impl View {
    /// A mask of a window in the image; none if it is empty or has no pixel in the core.
    fn new(mask: GeneratedMask, tile: &Tile, size: Size) -> Option<Self> {
        let Tile { core, window } = tile;
        let (left, top) = (window.left, window.top);
        let placed = mask.mask.placed((top, left), size);
        let bounds = placed.bounds()?;
        let area = placed.area();
        if placed.area_within(core.corners()) == 0 {
            return None;
        }
        let cut = (bounds[0] == left && left > 0)
            || (bounds[1] == top && top > 0)
            || (bounds[2] + 1 == window.right && window.right < size.1)
            || (bounds[3] + 1 == window.bottom && window.bottom < size.0);
        let Crop { left: x0, top: y0, right: x1, bottom: y1 } = mask.crop;
        let [x0, x1] = [x0, x1].map(|x| x.saturating_add(left));
        let [y0, y1] = [y0, y1].map(|y| y.saturating_add(top));
        let crop = Crop { left: x0, top: y0, right: x1, bottom: y1 };
        let point = [mask.point[0] + left as f32, mask.point[1] + top as f32];
        let mask = GeneratedMask { mask: placed, bounds, point, crop, ..mask };
        Some(Self { mask, window: *window, cut, area, tile: 0 })
    }

    /// The IoU with a mask of another window, where both are known.
    fn iou(&self, other: &Self) -> f64 {
        let inclusive = |[x0, y0, x1, y1]: [u32; 4]| [x0, y0, x1 + 1, y1 + 1];
        if !overlap(inclusive(self.mask.bounds), inclusive(other.mask.bounds)) {
            return 0.0;
        }
        let both = self.mask.mask.intersection(&other.mask.mask);
        let known = |mask: &Self, to: &Self| match to.cut {
            true => mask.mask.mask.area_within(to.window.corners()),
            false => mask.area,
        };
        both as f64 / (known(self, other) + known(other, self) - both).max(1) as f64
    }
}

/// Whether two boxes `[x0, y0, x1, y1]`, their last sides outside, share a pixel.
fn overlap(a: [u32; 4], b: [u32; 4]) -> bool {
    a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3]
}

/// The mask of an object from its views, which are of different windows.
fn united(mut views: Vec<View>) -> Option<GeneratedMask> {
    if views.iter().any(|view| !view.cut) {
        views.retain(|view| !view.cut);
        // The first of the best.
        let best = views.into_iter().reduce(|best, view| {
            match view.mask.iou_score.total_cmp(&best.mask.iou_score).is_gt() {
                true => view,
                false => best,
            }
        });
        return best.map(|view| view.mask);
    }
    let union = |a: GeneratedMask, b: GeneratedMask| {
        let mask: Rle = a.mask.union(&b.mask);
        let best = if b.iou_score > a.iou_score { b.point } else { a.point };
        GeneratedMask {
            bounds: mask.bounds().unwrap_or(a.bounds),
            mask,
            // A union is no better than its worst part.
            iou_score: a.iou_score.min(b.iou_score),
            stability_score: a.stability_score.min(b.stability_score),
            point: best,
            crop: Crop {
                left: a.crop.left.min(b.crop.left),
                top: a.crop.top.min(b.crop.top),
                right: a.crop.right.max(b.crop.right),
                bottom: a.crop.bottom.max(b.crop.bottom),
            },
        }
    };
    views.into_iter().map(|view| view.mask).reduce(union)
}
