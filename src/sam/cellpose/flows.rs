//! A flow field, what the network gives and cells are found in.

use crate::{Error, Result};

/// A flow field of an image, with values row by row.
///
/// [Example](crate::sam::CellposeSam)
#[derive(Clone, Debug, PartialEq)]
pub struct CellFlows {
    /// Flow down, 5 for a step of one pixel.
    pub down: Vec<f32>,
    /// Flow to the right.
    pub right: Vec<f32>,
    /// Logits of the cell probability.
    pub probability: Vec<f32>,
    /// Height and width.
    pub size: (usize, usize),
}

impl CellFlows {
    pub(super) fn validate(&self) -> Result<()> {
        let (height, width) = self.size;
        if height < 2 || width < 2 {
            let message = format!("{width} x {height} pixels, expected 2 or more a side");
            return Err(Error::config(format!("cellpose: {message}")));
        }
        for (name, values) in
            [("down", &self.down), ("right", &self.right), ("probability", &self.probability)]
        {
            if height.checked_mul(width) != Some(values.len()) {
                return Err(Error::config(format!(
                    "cellpose: {} values of {name}, expected {height} x {width}",
                    values.len()
                )));
            }
        }
        Ok(())
    }
}
