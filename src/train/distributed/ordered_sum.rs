//! The sum of the gradients of a step's parts, in the order of the parts.

use super::Communicator;
use crate::train::Gradients;
use crate::{Error, Result};
use std::ops::Range;

/// A sum in the making.
pub(in crate::train) enum OrderedSum<'a> {
    /// In one process, on the device.
    Alone(Option<Gradients>),
    /// This rank's chunk of the sum, in main memory.
    Shared { communicator: &'a dyn Communicator, chunk: Option<Vec<f32>>, like: Option<Gradients> },
}

impl<'a> OrderedSum<'a> {
    pub fn new(communicator: &'a dyn Communicator) -> Self {
        match communicator.size() {
            1 => Self::Alone(None),
            _ => Self::Shared { communicator, chunk: None, like: None },
        }
    }

    /// Adds one part of every rank, that of rank 0 first.
    pub fn add(&mut self, found: Gradients) -> Result<()> {
        match self {
            Self::Alone(sum) => {
                *sum = Some(match sum.take() {
                    Some(before) => before.plus(&found)?,
                    None => found,
                })
            }
            Self::Shared { communicator, chunk, like } => {
                let own = found.to_vec()?;
                let pieces: Vec<&[u8]> = (0..communicator.size())
                    .map(|rank| {
                        bytemuck::cast_slice(&own[chunk_of(own.len(), rank, *communicator)])
                    })
                    .collect();
                for (rank, piece) in communicator.all_to_all(&pieces)?.iter().enumerate() {
                    let piece: Vec<f32> = floats(rank, piece)?;
                    match chunk {
                        None => *chunk = Some(piece),
                        Some(chunk) if chunk.len() == piece.len() => {
                            chunk.iter_mut().zip(&piece).for_each(|(sum, term)| *sum += term)
                        }
                        Some(chunk) => {
                            let (found, expected) = (piece.len(), chunk.len());
                            let message = format!("{found} gradients, expected {expected}");
                            return Err(Error::Rank { rank, message });
                        }
                    }
                }
                *like = Some(found);
            }
        }
        Ok(())
    }

    /// The whole sum, on every rank; nothing if nothing was added.
    pub fn finish(self) -> Result<Option<Gradients>> {
        match self {
            Self::Alone(sum) => Ok(sum),
            Self::Shared { communicator, chunk: Some(chunk), like: Some(like) } => {
                let chunks = communicator.all_gather(bytemuck::cast_slice(&chunk))?;
                let mut sum = Vec::with_capacity(like.len());
                for (rank, chunk) in chunks.iter().enumerate() {
                    sum.extend(floats(rank, chunk)?);
                }
                like.with_values(sum).map(Some)
            }
            Self::Shared { .. } => Ok(None),
        }
    }
}

/// Which of `len` elements a rank adds.
fn chunk_of(len: usize, rank: usize, communicator: &dyn Communicator) -> Range<usize> {
    // Not len * rank / size, which may overflow.
    let (size, rest) = (len / communicator.size(), len % communicator.size());
    let start = |rank: usize| rank * size + rank.min(rest);
    start(rank)..start(rank + 1)
}

fn floats(rank: usize, bytes: &[u8]) -> Result<Vec<f32>> {
    let (words, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        let message = format!("{} bytes of gradients, not a multiple of 4", bytes.len());
        return Err(Error::Rank { rank, message });
    }
    Ok(words.iter().map(|word| f32::from_ne_bytes(*word)).collect())
}
