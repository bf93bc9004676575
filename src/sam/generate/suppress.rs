//! Which of several masks of the same thing stay: non-maximum suppression by the overlap of boxes or of masks.

use crate::sam::Rle;

/// The places of what stays, best score first: everything that overlaps a better one by more than `threshold` goes.
fn suppressed(scores: &[f32], threshold: f64, iou: impl Fn(usize, usize) -> f32) -> Vec<usize> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
    let mut kept: Vec<usize> = vec![];
    for candidate in order {
        if kept.iter().all(|better| f64::from(iou(*better, candidate)) <= threshold) {
            kept.push(candidate);
        }
    }
    kept
}

/// By the boxes `[x0, y0, x1, y1]`, whose sides are the differences of their corners.
///
/// Source: `nms` of torchvision.
pub(super) fn by_boxes(boxes: &[[f32; 4]], scores: &[f32], threshold: f64) -> Vec<usize> {
    let area = |[x0, y0, x1, y1]: [f32; 4]| (x1 - x0) * (y1 - y0);
    suppressed(scores, threshold, |a, b| {
        let (a, b) = (boxes[a], boxes[b]);
        let width = (a[2].min(b[2]) - a[0].max(b[0])).max(0.0);
        let height = (a[3].min(b[3]) - a[1].max(b[1])).max(0.0);
        let both = width * height;
        let iou = both / (area(a) + area(b) - both);
        // Two boxes without area.
        if iou.is_nan() {
            0.0
        } else {
            iou
        }
    })
}

/// By the masks themselves.
pub(super) fn by_masks(masks: &[&Rle], scores: &[f32], threshold: f64) -> Vec<usize> {
    let areas: Vec<u64> = masks.iter().map(|mask| mask.area()).collect();
    let bounds: Vec<Option<[u32; 4]>> = masks.iter().map(|mask| mask.bounds()).collect();
    suppressed(scores, threshold, |a, b| {
        // Most pairs are far apart.
        if !bounds[a].zip(bounds[b]).is_some_and(|(a, b)| touch(a, b)) {
            return 0.0;
        }
        let both = masks[a].intersection(masks[b]);
        match areas[a] + areas[b] - both {
            0 => 0.0,
            either => (both as f64 / either as f64) as f32,
        }
    })
}

/// Whether two boxes of pixels share one.
fn touch(a: [u32; 4], b: [u32; 4]) -> bool {
    a[0] <= b[2] && b[0] <= a[2] && a[1] <= b[3] && b[1] <= a[3]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two crossing bars have the same box: by boxes one goes, by masks both stay.
    #[test]
    fn crossing_objects_are_told_apart_by_their_masks() -> crate::Result<()> {
        let bar = |inside: fn(usize, usize) -> bool| {
            let pixels: Vec<bool> = (0..100).map(|i| inside(i / 10, i % 10)).collect();
            Rle::from_mask(&pixels, (10, 10))
        };
        let (a, b) = (bar(|y, x| x.abs_diff(y) < 2)?, bar(|y, x| (9 - x).abs_diff(y) < 2)?);
        assert_eq!(a.bounds(), b.bounds());
        let boxes = [[0.0, 0.0, 9.0, 9.0]; 2];
        assert_eq!(by_boxes(&boxes, &[0.8, 0.9], 0.7), [1]);
        assert_eq!(by_masks(&[&a, &b], &[0.8, 0.9], 0.7), [1, 0]);
        assert_eq!(by_masks(&[&a, &a, &b], &[0.8, 0.9, 0.1], 0.7), [1, 2]);
        Ok(())
    }
}
