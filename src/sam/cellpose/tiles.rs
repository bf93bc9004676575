//! Images of any size through a network of one: overlapping tiles, averaged with weights that fall off to their edges.
//!
//! Source: `run_net` in `core.py`; `get_pad_yx`, `make_tiles`, `average_tiles` in `transforms.py` of Cellpose 4.2.

use super::{CellFlows, CellposeSam, OUTPUTS};
use crate::nn::Mode;
use candle_core::{bail, DType, Result, Tensor};

/// Images are padded to a multiple of this, half of it on either side at least.
const UNIT: usize = 16;
/// Share of a tile that its neighbours have too.
const OVERLAP: f64 = 0.1;
/// Tiles that the network takes at a time.
const TOGETHER: usize = 8;
/// The weights of a tile are one half so many pixels from its edge.
const TAPER: f64 = 20.0;
/// And fall off over so many.
const TAPER_WIDTH: f64 = 7.5;
/// The least side that weights are computed for.
const TAPER_SIDE: usize = 224;

impl CellposeSam {
    /// The flow field of an image `[channels, H, W]` of any size, normalised as by
    /// [`normalized_image`](super::normalized_image). Missing channels are zero.
    ///
    /// # Errors
    /// - the image has no pixel, or more channels than the network.
    pub fn flows(&self, image: &Tensor) -> Result<CellFlows> {
        let (height, width, side) = self.sides(image)?;
        let projection = &self.encoder.patch_embed.projection.weight;
        let channels = projection.dim(1)? - image.dim(0)?;
        let (above, below) = padding(height, side);
        let (left, right) = padding(width, side);
        let padded = image
            .to_device(projection.device())?
            .to_dtype(projection.dtype())?
            .pad_with_zeros(0, 0, channels)?
            .pad_with_zeros(1, above, below)?
            .pad_with_zeros(2, left, right)?;
        let (rows, columns) = (above + height + below, left + width + right);
        let corners: Vec<(usize, usize)> = starts(rows, side)
            .flat_map(|top| starts(columns, side).map(move |left| (top, left)))
            .collect();
        let weights = taper(side);
        let mut sums = vec![vec![0f32; rows * columns]; OUTPUTS];
        let mut total = vec![0f64; rows * columns];
        for some in corners.chunks(TOGETHER) {
            let tile =
                |&(top, left): &(usize, usize)| padded.narrow(1, top, side)?.narrow(2, left, side);
            let tiles = some.iter().map(tile).collect::<Result<Vec<_>>>()?;
            let out = self.forward(&Tensor::stack(&tiles, 0)?, Mode::Eval)?.detach();
            let out = out.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
            for (&(top, left), planes) in some.iter().zip(out.chunks(OUTPUTS * side * side)) {
                for (index, weight) in weights.iter().enumerate() {
                    let pixel = (top + index / side) * columns + left + index % side;
                    total[pixel] += weight;
                    for (sum, plane) in sums.iter_mut().zip(planes.chunks(side * side)) {
                        let value = f64::from(plane[index]) * weight;
                        sum[pixel] = (f64::from(sum[pixel]) + value) as f32;
                    }
                }
            }
        }
        let inside = |sum: &Vec<f32>| -> Vec<f32> {
            let pixels = (above..above + height)
                .flat_map(|y| (left..left + width).map(move |x| y * columns + x));
            pixels.map(|pixel| (f64::from(sum[pixel]) / total[pixel]) as f32).collect()
        };
        let [down, right, probability] = [0, 1, 2].map(|output| inside(&sums[output]));
        Ok(CellFlows { down, right, probability, size: (height, width) })
    }

    /// Height and width of an image, and the side of the network's input.
    fn sides(&self, image: &Tensor) -> Result<(usize, usize, usize)> {
        let most = self.encoder.patch_embed.projection.weight.dim(1)?;
        match *image.dims() {
            [channels, height, width]
                if (1..=most).contains(&channels) && height > 0 && width > 0 =>
            {
                Ok((height, width, self.encoder.patch_embed.image_size()))
            }
            ref other => {
                bail!("cellpose: the image must have shape [1 to {most}, H, W], got {other:?}")
            }
        }
    }
}

/// Zeros before and after a side.
fn padding(length: usize, side: usize) -> (usize, usize) {
    let more = match length >= side {
        true => length.next_multiple_of(UNIT) - length,
        false => (side - length).saturating_sub(UNIT),
    };
    (UNIT / 2 + more / 2, UNIT / 2 + more.div_ceil(2))
}

/// Where the tiles of a length begin.
fn starts(length: usize, side: usize) -> impl Iterator<Item = usize> {
    let count = match length <= side {
        true => 1,
        false => ((1.0 + 2.0 * OVERLAP) * length as f64 / side as f64).ceil() as usize,
    };
    let last = length - side.min(length);
    let step = if count > 1 { last as f64 / (count - 1) as f64 } else { 0.0 };
    (0..count).map(move |index| match index + 1 == count {
        true if count > 1 => last,
        _ => (index as f64 * step) as usize,
    })
}

/// The weights of a tile, row by row.
fn taper(side: usize) -> Vec<f64> {
    let whole = side.max(TAPER_SIDE);
    let first = whole / 2 - side / 2;
    let weight = |place: usize| {
        let from_centre = (place as f64 - (whole as f64 - 1.0) / 2.0).abs();
        1.0 / (1.0 + ((from_centre - (whole as f64 / 2.0 - TAPER)) / TAPER_WIDTH).exp())
    };
    let line: Vec<f64> = (first..first + side).map(weight).collect();
    line.iter().flat_map(|y| line.iter().map(move |x| y * x)).collect()
}
