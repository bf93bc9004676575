//! Which channels of an image are its colours.

use std::fmt::{Display, Formatter};
use std::str::FromStr;

/// The channels of a TIFF that become red, green and blue, from 1: aerial pictures and microscopes have others.
///
/// ```
/// use candle_sam_lora::sam::{Channels, ReadOptions};
///
/// # fn main() -> Result<(), String> {
/// let infrared: Channels = "4,1,2".parse()?; // infrared light as red, red as green, green as blue
/// assert_eq!(infrared, Channels([4, 1, 2]));
/// let options = ReadOptions { channels: Some(infrared), ..ReadOptions::default() };
/// # assert_eq!(options.page, None);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Channels(pub [usize; 3]);

impl FromStr for Channels {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let numbers: Option<Vec<usize>> =
            text.split(',').map(|part| part.trim().parse().ok().filter(|n| *n > 0)).collect();
        match numbers.as_deref() {
            Some([red, green, blue]) => Ok(Self([*red, *green, *blue])),
            _ => Err(format!("expected three channels, from 1, as R,G,B, got {text:?}")),
        }
    }
}

impl Display for Channels {
    fn fmt(&self, f: &mut Formatter<'_>) -> std::fmt::Result {
        let [red, green, blue] = self.0;
        write!(f, "{red},{green},{blue}")
    }
}

/// The channels of a page that are read.
#[derive(Clone, Copy)]
pub(super) enum Chosen {
    /// All; they must be grey or colours.
    All,
    /// One as grey, from 0.
    One(usize),
    /// Three as colours.
    Three(Channels),
}

impl Channels {
    /// The places of the channels among `count`.
    ///
    /// # Errors
    /// - there is no such channel.
    pub(super) fn places(self, count: usize) -> Result<[usize; 3], String> {
        match self.0.iter().find(|channel| !(1..=count).contains(*channel)) {
            Some(channel) => Err(format!("there is no channel {channel}: it has {count}")),
            None => Ok(self.0.map(|channel| channel - 1)),
        }
    }
}
