//! Bytes of one rank that all need.

use super::ordered_sum::chunk_of;
use super::Communicator;
use crate::Result;

/// The bytes of rank 0, on every rank; those of the others do not count.
///
/// Each rank gets a chunk and passes it on, so rank 0 sends them twice, however many ranks there are.
///
/// # Errors
/// - the exchange failed.
pub(in crate::train) fn broadcast(communicator: &dyn Communicator, own: &[u8]) -> Result<Vec<u8>> {
    let (rank, size) = (communicator.rank(), communicator.size());
    let own = if rank == 0 { own } else { &[] };
    let chunks: Vec<&[u8]> = (0..size).map(|rank| &own[chunk_of(own.len(), rank, size)]).collect();
    let received = communicator.all_to_all(&chunks)?;
    let chunk = received.first().map_or(&[][..], Vec::as_slice);
    Ok(communicator.all_gather(chunk)?.concat())
}
