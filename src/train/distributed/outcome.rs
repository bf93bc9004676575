//! Outcome of the same work on every rank.

use super::Communicator;
use crate::Error;
use std::fmt::Display;

/// The first byte of what a rank says about its work.
const DONE: u8 = 0;
const FAILED: u8 = 1;

/// Result of this rank's work, and `told` of every rank's, by rank, if all ranks succeeded.
///
/// [Example](crate::train::share)
///
/// # Errors
/// - the work of a rank failed: the same error on every rank, which names the lowest such rank and its reason;
/// - the exchange failed.
pub fn together<T, E: Display + From<Error>>(
    communicator: &dyn Communicator,
    own: Result<T, E>,
    told: impl Fn(&T) -> Vec<u8>,
) -> Result<(T, Vec<Vec<u8>>), E> {
    if communicator.size() == 1 {
        let own = own?;
        let told = told(&own);
        return Ok((own, vec![told]));
    }
    let message = match &own {
        Ok(own) => [&[DONE], told(own).as_slice()].concat(),
        Err(error) => [&[FAILED], error.to_string().as_bytes()].concat(),
    };
    let all = communicator.all_gather(&message)?;
    let value = |(rank, message): (usize, &Vec<u8>)| match message.split_first() {
        Some((&DONE, bytes)) => Ok(bytes.to_vec()),
        Some((_, reason)) => {
            Err(Error::Rank { rank, message: String::from_utf8_lossy(reason).into_owned() })
        }
        None => Err(Error::Rank { rank, message: "said nothing about its work".to_string() }),
    };
    let told = all.iter().enumerate().map(value).collect::<Result<_, _>>()?;
    Ok((own?, told))
}
