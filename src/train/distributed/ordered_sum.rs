//! The sums of a step's parts, losses and gradients, in the order of the parts.
//!
//! ```text
//! small gradients     with the loss, to all: one exchange a part             every rank adds all elements
//! large gradients     a chunk to each rank, and the chunks once a step       every rank adds its chunk
//! ```
//! Both add the same numbers in the same order.

use super::{together, Communicator, StepTimes};
use crate::train::Gradients;
use crate::{Error, Result};
use candle_core::{Device, Tensor};
use std::ops::Range;
use std::time::{Duration, Instant};

/// Small gradients: those of all ranks together have at most so many bytes.
///
/// Chunks save bytes, and cost an exchange a part and one a step. Between processes of one host they win from 64 to 256
/// KiB on. On a network of 10 Gb/s two exchanges take as long as some 200 KiB: see `benches/distributed.rs`.
const SMALL: usize = 128 << 10;

/// The sums in the making, and the time that the parts took.
pub(in crate::train) struct OrderedSum<'a> {
    communicator: &'a dyn Communicator,
    /// Losses of all ranks' parts, where there are several ranks.
    loss: f32,
    gradients: Sum,
    times: StepTimes,
    /// When this rank's part began.
    begun: Instant,
}

enum Sum {
    /// In one process, on the device, with the losses.
    Alone(Option<(Tensor, Gradients)>),
    /// In main memory: all elements, or this rank's chunk. With gradients of the shapes of the sum.
    Shared(Option<(Vec<f32>, Gradients)>),
}

/// A part of a rank as the others hear of it.
struct Told<'a> {
    loss: f32,
    compute: Duration,
    /// Gradients, if they are small.
    gradients: &'a [u8],
}

impl<'a> OrderedSum<'a> {
    /// Nothing yet; the first part begins now.
    pub fn new(communicator: &'a dyn Communicator) -> Self {
        let gradients = match communicator.size() {
            1 => Sum::Alone(None),
            _ => Sum::Shared(None),
        };
        let (times, begun) = (StepTimes::default(), Instant::now());
        Self { communicator, loss: 0.0, gradients, times, begun }
    }

    /// Adds one part of every rank, that of rank 0 first. The next part begins when it returns.
    ///
    /// # Errors
    /// - the part of a rank failed, on every rank;
    /// - the exchange failed.
    pub fn add(
        &mut self,
        own: candle_core::Result<(Tensor, Gradients)>,
    ) -> candle_core::Result<()> {
        let compute = self.begun.elapsed();
        match &mut self.gradients {
            Sum::Alone(sum) => {
                let (loss, found) = own?;
                *sum = Some(match sum.take() {
                    Some((losses, before)) => ((losses + loss)?, before.plus(&found)?),
                    None => (loss, found),
                });
                self.times.part(&[compute], compute, compute);
            }
            Sum::Shared(_) => self.exchange(own, compute)?,
        }
        self.begun = Instant::now();
        Ok(())
    }

    fn exchange(
        &mut self,
        own: candle_core::Result<(Tensor, Gradients)>,
        compute: Duration,
    ) -> candle_core::Result<()> {
        let communicator = self.communicator;
        let own =
            own.and_then(|(loss, found)| Ok((loss.to_scalar::<f32>()?, found.to_vec()?, found)));
        let size = communicator.size();
        let ((_, values, found), told) = together(communicator, own, |(loss, values, _)| {
            let gradients = if are_small(values.len(), size) { values } else { &[][..] };
            Told { loss: *loss, compute, gradients: bytemuck::cast_slice(gradients) }.to_bytes()
        })?;
        let told = told.iter().enumerate().map(|(rank, bytes)| Told::from_bytes(rank, bytes));
        let told = told.collect::<Result<Vec<_>>>()?;
        let chunks = match are_small(values.len(), size) {
            true => None,
            false => {
                let chunk = |rank| &values[chunk_of(values.len(), rank, size)];
                let chunks: Vec<&[u8]> =
                    (0..size).map(|rank| bytemuck::cast_slice(chunk(rank))).collect();
                Some(communicator.all_to_all(&chunks)?)
            }
        };
        let mut sum = match std::mem::replace(&mut self.gradients, Sum::Shared(None)) {
            Sum::Shared(Some((sum, _))) => Some(sum),
            _ => None,
        };
        for (rank, told) in told.iter().enumerate() {
            self.loss += told.loss;
            let bytes = chunks.as_ref().map_or(told.gradients, |chunks| &chunks[rank]);
            sum = Some(plus(sum, rank, bytes)?);
        }
        self.gradients = Sum::Shared(sum.map(|sum| (sum, found)));
        let all: Vec<_> = told.iter().map(|told| told.compute).collect();
        self.times.part(&all, compute, self.begun.elapsed());
        Ok(())
    }

    /// The sum of the losses, the gradients' and where the time went, on every rank; nothing if nothing was added.
    pub fn finish(mut self) -> Result<Option<(Tensor, Gradients, StepTimes)>> {
        let gradients = match self.gradients {
            Sum::Alone(sum) => {
                return Ok(sum.map(|(loss, gradients)| (loss, gradients, self.times)));
            }
            Sum::Shared(None) => None,
            Sum::Shared(Some((sum, like))) if are_small(like.len(), self.communicator.size()) => {
                Some(like.with_values(sum)?)
            }
            Sum::Shared(Some((chunk, like))) => {
                let chunks = self.communicator.all_gather(bytemuck::cast_slice(&chunk))?;
                let mut sum = Vec::with_capacity(like.len());
                for (rank, chunk) in chunks.iter().enumerate() {
                    sum.extend(floats(rank, chunk)?);
                }
                self.times.exchange += self.begun.elapsed();
                Some(like.with_values(sum)?)
            }
        };
        let loss = Tensor::new(self.loss, &Device::Cpu)?;
        Ok(gradients.map(|gradients| (loss, gradients, self.times)))
    }
}

impl<'a> Told<'a> {
    fn to_bytes(&self) -> Vec<u8> {
        let (loss, compute) = (self.loss.to_ne_bytes(), self.compute.as_secs_f64().to_ne_bytes());
        [&loss, &compute[..], self.gradients].concat()
    }

    fn from_bytes(rank: usize, bytes: &'a [u8]) -> Result<Self> {
        let fields = bytes.split_first_chunk().and_then(|(loss, rest)| {
            let (compute, gradients) = rest.split_first_chunk()?;
            let compute = Duration::try_from_secs_f64(f64::from_ne_bytes(*compute)).ok()?;
            Some(Self { loss: f32::from_ne_bytes(*loss), compute, gradients })
        });
        fields.ok_or_else(|| {
            let message = format!("{} bytes about its part, not a loss and a time", bytes.len());
            Error::Rank { rank, message }
        })
    }
}

/// `sum` and the gradients in `bytes`.
fn plus(sum: Option<Vec<f32>>, rank: usize, bytes: &[u8]) -> Result<Vec<f32>> {
    let terms = floats(rank, bytes)?;
    let Some(mut sum) = sum else { return Ok(terms.collect()) };
    if terms.len() != sum.len() {
        let message = format!("{} gradients, expected {}", terms.len(), sum.len());
        return Err(Error::Rank { rank, message });
    }
    sum.iter_mut().zip(terms).for_each(|(sum, term)| *sum += term);
    Ok(sum)
}

/// Whether `len` gradients of each of `size` ranks go to all of them.
fn are_small(len: usize, size: usize) -> bool {
    len <= SMALL / size_of::<f32>() / size
}

/// Which of `len` elements a rank of `size` adds.
pub(super) fn chunk_of(len: usize, rank: usize, size: usize) -> Range<usize> {
    // Not len * rank / size, which may overflow.
    let (each, rest) = (len / size, len % size);
    let start = |rank: usize| rank * each + rank.min(rest);
    start(rank)..start(rank + 1)
}

fn floats(rank: usize, bytes: &[u8]) -> Result<impl ExactSizeIterator<Item = f32> + '_> {
    let (words, rest) = bytes.as_chunks::<4>();
    if !rest.is_empty() {
        let message = format!("{} bytes of gradients, not a multiple of 4", bytes.len());
        return Err(Error::Rank { rank, message });
    }
    Ok(words.iter().map(|word| f32::from_ne_bytes(*word)))
}
