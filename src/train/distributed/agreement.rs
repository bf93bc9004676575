//! Whether all ranks have the same run before them.

use super::{together, Communicator};
use crate::train::checkpoint::{differences, Difference};
use crate::{Error, Result};
use serde_json::{Map, Value};

/// Fails unless `settings` are the same on all ranks.
///
/// [Example](crate::train::share)
///
/// # Errors
/// - a rank has other settings than rank 0: every difference is told, on every rank;
/// - the exchange failed.
pub fn check_agreement(
    communicator: &dyn Communicator,
    settings: &Map<String, Value>,
) -> Result<()> {
    let own = serde_json::to_vec(settings).map_err(|e| Error::config(e.to_string()))?;
    let read = |rank: usize, bytes: &[u8]| {
        serde_json::from_slice::<Map<String, Value>>(bytes).map_err(|e| {
            let message = format!("its settings are no JSON ({e}); is it the same version?");
            Error::Rank { rank, message }
        })
    };
    let ((), all) = together(communicator, Ok::<_, Error>(()), |()| own.clone())?;
    let Some(first) = all.first() else { return Ok(()) };
    let expected = read(0, first)?;
    for (rank, bytes) in all.iter().enumerate().skip(1) {
        let differences = differences("", &expected, &read(rank, bytes)?);
        if !differences.is_empty() {
            let lines = differences.iter().map(|Difference { name, first, second }| {
                format!("\n  {name}: {second}, on rank 0 {first}")
            });
            let message = format!("its run is not that of rank 0:{}", lines.collect::<String>());
            return Err(Error::Rank { rank, message });
        }
    }
    Ok(())
}
