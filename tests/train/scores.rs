//! IoU, Dice and the boundary measure against naive implementations, and cases whose scores are known.

use crate::common::property;
use candle_core::{Device, Result, Tensor};
use candle_sam_lora::train::Scores;
use proptest::prelude::*;

type Mask = Vec<Vec<bool>>;

fn tensor(mask: &Mask) -> Result<Tensor> {
    let (height, width) = (mask.len(), mask[0].len());
    let values: Vec<u8> = mask.iter().flatten().map(|inside| u8::from(*inside)).collect();
    Tensor::from_vec(values, (height, width), &Device::Cpu)
}

fn scores(mask: &Mask, truth: &Mask) -> Scores {
    tensor(mask).and_then(|m| Scores::of(&m, &tensor(truth)?)).expect("scores")
}

fn mask(height: usize, width: usize, inside: impl Fn(usize, usize) -> bool) -> Mask {
    (0..height).map(|y| (0..width).map(|x| inside(y, x)).collect()).collect()
}

/// `seg2bmap` of DAVIS, line by line: copies shifted by one, exclusive or, the last row and column apart.
fn naive_boundary(seg: &Mask) -> Vec<(usize, usize)> {
    let (h, w) = (seg.len(), seg[0].len());
    let shifted =
        |dy: usize, dx: usize| mask(h, w, |y, x| y + dy < h && x + dx < w && seg[y + dy][x + dx]);
    let (e, s, se) = (shifted(0, 1), shifted(1, 0), shifted(1, 1));
    let mut b = mask(h, w, |y, x| seg[y][x] ^ e[y][x] | seg[y][x] ^ s[y][x] | seg[y][x] ^ se[y][x]);
    for x in 0..w {
        b[h - 1][x] = seg[h - 1][x] ^ e[h - 1][x];
    }
    for y in 0..h {
        b[y][w - 1] = seg[y][w - 1] ^ s[y][w - 1];
    }
    b[h - 1][w - 1] = false;
    (0..h).flat_map(|y| (0..w).map(move |x| (y, x))).filter(|&(y, x)| b[y][x]).collect()
}

/// `f_measure` of DAVIS with the dilation by a disk as what it means: a distance.
fn naive_boundary_f1(found: &Mask, truth: &Mask) -> f64 {
    let (h, w) = (found.len() as f64, found[0].len() as f64);
    let reach = (0.008 * (h * h + w * w).sqrt()).ceil();
    let (found, truth) = (naive_boundary(found), naive_boundary(truth));
    let near = |a: &(usize, usize), b: &(usize, usize)| {
        let (dy, dx) = (a.0 as f64 - b.0 as f64, a.1 as f64 - b.1 as f64);
        dy * dy + dx * dx <= reach * reach
    };
    let part = |of: &[(usize, usize)], by: &[(usize, usize)]| {
        of.iter().filter(|a| by.iter().any(|b| near(a, b))).count() as f64 / of.len() as f64
    };
    let (precision, recall) = match (found.len(), truth.len()) {
        (0, 0) => (1.0, 1.0),
        (0, _) => (1.0, 0.0),
        (_, 0) => (0.0, 1.0),
        _ => (part(&found, &truth), part(&truth, &found)),
    };
    if precision + recall == 0.0 {
        0.0
    } else {
        2.0 * precision * recall / (precision + recall)
    }
}

/// Blobs: a few discs, some cut by the border.
fn blobs() -> impl Strategy<Value = (Mask, Mask)> {
    (1usize..200, 1usize..200).prop_flat_map(|(h, w)| {
        let disc = (0..h, 0..w, 0usize..40);
        let some = proptest::collection::vec(disc, 0..4);
        (some.clone(), some).prop_map(move |(a, b)| {
            let draw = |discs: &[(usize, usize, usize)]| {
                mask(h, w, |y, x| {
                    discs.iter().any(|&(cy, cx, r)| {
                        let (dy, dx) = (y.abs_diff(cy), x.abs_diff(cx));
                        dy * dy + dx * dx <= r * r
                    })
                })
            };
            (draw(&a), draw(&b))
        })
    })
}

proptest! {
    #![proptest_config(property::config(200))]

    #[test]
    fn scores_are_those_of_a_naive_implementation((found, truth) in blobs()) {
        let got = scores(&found, &truth);
        let count = |f: &dyn Fn(bool, bool) -> bool| {
            found.iter().flatten().zip(truth.iter().flatten()).filter(|(a, b)| f(**a, **b)).count() as f64
        };
        let (both, any) = (count(&|a, b| a && b), count(&|a, b| a || b));
        let sum = count(&|a, _| a) + count(&|_, b| b);
        prop_assert_eq!(got.iou, if any == 0.0 { 1.0 } else { both / any });
        prop_assert_eq!(got.dice, if sum == 0.0 { 1.0 } else { 2.0 * both / sum });
        prop_assert_eq!(got.boundary_f1, naive_boundary_f1(&found, &truth));
        // Either way round the scores are the same.
        let back = scores(&truth, &found);
        prop_assert!((back.boundary_f1 - got.boundary_f1).abs() < 1e-15 && back.iou == got.iou);
    }
}

#[test]
fn known_cases() {
    let square = |offset: usize| {
        mask(100, 100, |y, x| (20..60).contains(&y) && (20 + offset..60 + offset).contains(&x))
    };
    let perfect = Scores { iou: 1.0, dice: 1.0, boundary_f1: 1.0 };
    assert_eq!(scores(&square(0), &square(0)), perfect);
    // The diagonal is 141.4, so that a boundary may be off by two pixels.
    let near = scores(&square(2), &square(0));
    assert_eq!((near.boundary_f1, near.iou), (1.0, 38.0 / 42.0));
    assert!(scores(&square(3), &square(0)).boundary_f1 < 1.0);
    assert_eq!(scores(&square(40), &square(0)).iou, 0.0);
    let (nothing, all) = (mask(9, 7, |_, _| false), mask(9, 7, |_, _| true));
    assert_eq!(scores(&nothing, &nothing), perfect);
    assert_eq!(scores(&all, &all), perfect);
    assert_eq!(scores(&nothing, &mask(9, 7, |y, x| y == 4 && x == 3)), Scores::default());
    // A mask of the whole image has no boundary.
    assert_eq!(scores(&all, &nothing), Scores { iou: 0.0, dice: 0.0, boundary_f1: 1.0 });
    let shapes = (tensor(&nothing), tensor(&mask(7, 9, |_, _| true)));
    let message = Scores::of(&shapes.0.unwrap(), &shapes.1.unwrap()).unwrap_err().to_string();
    assert!(message.contains("[9, 7]") && message.contains("[7, 9]"), "{message}");
}
