//! How predicted IoUs follow the true ones.

use serde::Serialize;

/// Equal parts of 0 to 1.
const BINS: usize = 10;

/// Masks of about one predicted IoU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Bin {
    /// Masks.
    pub count: usize,
    /// Mean of their predicted IoUs.
    pub predicted: f64,
    /// Mean of their true IoUs.
    pub iou: f64,
}

/// Predicted and true IoUs in ten bins by the predicted one; bins without a mask are left out.
pub fn bins<'a>(pairs: impl IntoIterator<Item = &'a (f32, f64)>) -> Vec<Bin> {
    let mut bins = [Bin::default(); BINS];
    for (predicted, iou) in pairs {
        // A head may predict less than 0 or more than 1.
        let predicted = f64::from(*predicted).clamp(0.0, 1.0);
        let bin = &mut bins[((predicted * BINS as f64) as usize).min(BINS - 1)];
        bin.count += 1;
        bin.predicted += predicted;
        bin.iou += iou;
    }
    let mean = |bin: Bin| {
        let count = bin.count as f64;
        Bin { predicted: bin.predicted / count, iou: bin.iou / count, ..bin }
    };
    bins.into_iter().filter(|bin| bin.count > 0).map(mean).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_hold_means_and_lose_no_mask() {
        let found = bins(&[(-0.5, 0.25), (0.05, 0.75), (1.0, 1.0), (1.5, 0.5), (0.5, 0.125)]);
        let expected = [(2, 0.025, 0.5), (1, 0.5, 0.125), (2, 1.0, 0.75)];
        for (bin, (count, predicted, iou)) in found.iter().zip(expected) {
            assert_eq!((bin.count, bin.iou), (count, iou));
            assert!((bin.predicted - predicted).abs() < 1e-8, "{bin:?}");
        }
        assert_eq!(found.len(), 3);
    }
}
