//! Items that ranks take as they become free: a slow item holds up nobody but its own rank.
//!
//! ```text
//! rank 0       takes item 0, then the next, and so on; a thread beside its work answers the others
//! rank r > 0   takes item r, tells rank 0 its result, and is answered with the next item
//! ```
//! Rank 0 alone gives out items, in ascending order, and it alone sees the results. A one-sided counter would need no
//! thread, but over TCP it answers only while rank 0 is inside MPI, not while it works.

use super::Communicator;
use crate::Error;
use std::cell::Cell;
use std::fmt::Display;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// How long a rank sleeps between two looks for messages.
const NAP: Duration = Duration::from_millis(1);
/// Messages of a rank to rank 0: a kind, then the number of an item and what there is to tell of it.
const ALIVE: u8 = 0;
const IDLE: u8 = 1;
const DONE: u8 = 2;
const FAILED: u8 = 3;
/// Answers of rank 0: a kind, then the number of an item. The answer `FAILED` names the rank that failed and why.
const WAIT: u8 = 4;
const NEXT: u8 = 5;
const END: u8 = 6;

/// Does the items `0..count` on all ranks. `work` does one and returns its result. On rank 0 `collect` gets all
/// results, as they come.
///
/// `work` calls its second argument now and then, as a sign of life: a rank that gives none within the communicator's
/// patience ends the job.
///
/// ```
/// use candle_sam_lora::train::{device_of_rank, share, threads_of_rank, together, Alone, Communicator};
/// use candle_sam_lora::Error;
///
/// # fn main() -> candle_sam_lora::Result<()> {
/// let ranks = Alone; // or `Mpi`, with the feature `mpi`
/// assert!(device_of_rank("cpu", &ranks)?.is_cpu() && threads_of_rank(&ranks)? > 0);
/// let mut squares = vec![0; 4];
/// share::<Error>(
///     &ranks,
///     squares.len(),
///     |item, _alive| Ok(vec![(item * item) as u8]),
///     |item, result| {
///         squares[item] = result[0];
///         Ok(())
///     },
/// )?;
/// assert_eq!(squares, [0, 1, 4, 9]);
/// let (own, all) = together(&ranks, Ok::<_, Error>(7u8), |seven| vec![*seven])?;
/// assert_eq!((own, all.len()), (7, ranks.size()));
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// - an item fails: no more are given out, those before it are still done, and all ranks return the error of the first;
/// - a result cannot be collected: as if its item had failed;
/// - a message cannot be exchanged.
pub fn share<E: Display + From<Error>>(
    communicator: &dyn Communicator,
    count: usize,
    mut work: impl FnMut(usize, &dyn Fn()) -> Result<Vec<u8>, E>,
    mut collect: impl FnMut(usize, Vec<u8>) -> Result<(), E> + Send,
) -> Result<(), E> {
    match (communicator.size(), communicator.rank()) {
        (1, _) => (0..count).try_for_each(|item| collect(item, work(item, &|| ())?)),
        (_, 0) => lead(communicator, count, work, collect),
        _ => Ok(follow(communicator, count, work)?),
    }
}

type Collect<'a> = Box<dyn FnMut(usize, Vec<u8>) -> Result<(), String> + Send + 'a>;

/// Who does what, on rank 0.
struct Ledger<'a> {
    count: usize,
    next: usize,
    /// The ranks at work.
    working: Vec<bool>,
    heard: Vec<Instant>,
    /// The first item that failed, its rank, and why.
    failed: Option<(usize, usize, String)>,
    collect: Collect<'a>,
}

impl<'a> Ledger<'a> {
    fn new(count: usize, size: usize, collect: Collect<'a>) -> Self {
        let working = (0..size).map(|rank| rank < count).collect();
        let heard = vec![Instant::now(); size];
        Self { count, next: count.min(size), working, heard, failed: None, collect }
    }

    /// The next item for a rank that is free.
    fn take(&mut self, rank: usize) -> Option<usize> {
        self.heard[rank] = Instant::now();
        let item = (self.failed.is_none() && self.next < self.count).then_some(self.next);
        self.next += usize::from(item.is_some());
        self.working[rank] = item.is_some();
        item
    }

    /// The outcome of an item.
    fn put(&mut self, rank: usize, item: usize, outcome: Result<Vec<u8>, String>) {
        if let Err(reason) = outcome.and_then(|told| (self.collect)(item, told)) {
            if self.failed.as_ref().is_none_or(|(first, ..)| item < *first) {
                self.failed = Some((item, rank, reason));
            }
        }
    }
}

fn lead<E: Display + From<Error>>(
    communicator: &dyn Communicator,
    count: usize,
    mut work: impl FnMut(usize, &dyn Fn()) -> Result<Vec<u8>, E>,
    mut collect: impl FnMut(usize, Vec<u8>) -> Result<(), E> + Send,
) -> Result<(), E> {
    let collect = Box::new(move |item, told| collect(item, told).map_err(|e| e.to_string()));
    let ledger = Mutex::new(Ledger::new(count, communicator.size(), collect));
    let answered = std::thread::scope(|scope| {
        let answering = scope.spawn(|| answer(communicator, &ledger));
        let alive = || locked(&ledger).heard[0] = Instant::now();
        let mut item = (count > 0).then_some(0);
        while let Some(own) = item {
            let outcome = work(own, &alive).map_err(|error| error.to_string());
            let mut ledger = locked(&ledger);
            ledger.put(0, own, outcome);
            item = ledger.take(0);
        }
        let panicked = || Error::config("the thread that gives out items panicked");
        answering.join().unwrap_or_else(|_| Err(panicked()))
    });
    answered?;
    let ledger = ledger.into_inner().unwrap_or_else(PoisonError::into_inner);
    match ledger.failed {
        None => Ok(()),
        Some((_, rank, message)) => Err(Error::Rank { rank, message }.into()),
    }
}

fn locked<'l, 'a>(ledger: &'l Mutex<Ledger<'a>>) -> MutexGuard<'l, Ledger<'a>> {
    ledger.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Answers the other ranks until all items are done.
fn answer(communicator: &dyn Communicator, ledger: &Mutex<Ledger<'_>>) -> crate::Result<()> {
    let answered = answer_all(communicator, ledger);
    if answered.is_err() {
        // Rank 0 must not go on alone.
        let mut ledger = locked(ledger);
        ledger.next = ledger.count;
    }
    answered
}

fn answer_all(communicator: &dyn Communicator, ledger: &Mutex<Ledger<'_>>) -> crate::Result<()> {
    let size = communicator.size();
    let (mut idle, mut told) = (vec![], Instant::now());
    while idle.len() + 1 < size || locked(ledger).working[0] {
        while let Some((rank, message)) = communicator.receive()? {
            let mut ledger = locked(ledger);
            match parsed(rank, &message)? {
                (ALIVE, ..) => {
                    ledger.heard[rank] = Instant::now();
                    continue;
                }
                (DONE, item, told) => ledger.put(rank, item, Ok(told.to_vec())),
                (FAILED, item, reason) => {
                    ledger.put(rank, item, Err(String::from_utf8_lossy(reason).into_owned()))
                }
                _ => {}
            }
            let item = ledger.take(rank);
            drop(ledger);
            match item {
                Some(item) => communicator.send(rank, &message_of(NEXT, item, &[]))?,
                None => idle.push(rank),
            }
        }
        let silent = {
            let ledger = locked(ledger);
            let waiting = |rank: &usize| !idle.contains(rank) && (*rank > 0 || ledger.working[0]);
            let silent = (0..size).filter(waiting).map(|rank| (rank, ledger.heard[rank].elapsed()));
            silent.filter(|(_, silence)| *silence > communicator.patience()).collect::<Vec<_>>()
        };
        if let Some((_, silence)) = silent.first() {
            let ranks: Vec<usize> = silent.iter().map(|(rank, _)| *rank).collect();
            super::lost(communicator, &ranks, *silence)
        }
        if told.elapsed() > beat(communicator) {
            told = Instant::now();
            idle.iter().try_for_each(|rank| communicator.send(*rank, &message_of(WAIT, 0, &[])))?;
        }
        std::thread::sleep(NAP);
    }
    let end = match &locked(ledger).failed {
        Some((_, rank, reason)) => message_of(FAILED, *rank, reason.as_bytes()),
        None => message_of(END, 0, &[]),
    };
    (1..size).try_for_each(|rank| communicator.send(rank, &end))
}

fn follow<E: Display>(
    communicator: &dyn Communicator,
    count: usize,
    mut work: impl FnMut(usize, &dyn Fn()) -> Result<Vec<u8>, E>,
) -> crate::Result<()> {
    let told = Cell::new(Instant::now());
    let alive = || {
        if told.get().elapsed() > beat(communicator) {
            told.set(Instant::now());
            // If it fails, so does the next message, which is checked.
            let _ = communicator.send(0, &message_of(ALIVE, 0, &[]));
        }
    };
    let mut item = Some(communicator.rank()).filter(|rank| *rank < count);
    loop {
        let message = match item.map(|item| (item, work(item, &alive))) {
            Some((item, Ok(told))) => message_of(DONE, item, &told),
            Some((item, Err(error))) => message_of(FAILED, item, error.to_string().as_bytes()),
            None => message_of(IDLE, 0, &[]),
        };
        communicator.send(0, &message)?;
        let answer = next_answer(communicator)?;
        match parsed(0, &answer)? {
            (NEXT, next, _) => item = Some(next),
            (END, ..) => return Ok(()),
            (_, rank, reason) => {
                let message = String::from_utf8_lossy(reason).into_owned();
                return Err(Error::Rank { rank, message });
            }
        }
    }
}

/// The next answer of rank 0 that is no request to wait.
fn next_answer(communicator: &dyn Communicator) -> crate::Result<Vec<u8>> {
    let mut heard = Instant::now();
    loop {
        match communicator.receive()? {
            Some((_, answer)) if answer.first() != Some(&WAIT) => return Ok(answer),
            Some(_) => heard = Instant::now(),
            None if heard.elapsed() > communicator.patience() => {
                super::lost(communicator, &[0], heard.elapsed())
            }
            None => std::thread::sleep(NAP),
        }
    }
}

/// The time between two signs of life.
fn beat(communicator: &dyn Communicator) -> Duration {
    (communicator.patience() / 8).min(Duration::from_secs(1))
}

fn message_of(kind: u8, number: usize, told: &[u8]) -> Vec<u8> {
    [&[kind], (number as u64).to_le_bytes().as_slice(), told].concat()
}

fn parsed(rank: usize, message: &[u8]) -> crate::Result<(u8, usize, &[u8])> {
    let parts = message.split_first().and_then(|(kind, rest)| {
        let (number, told) = rest.split_first_chunk()?;
        Some((*kind, u64::from_le_bytes(*number) as usize, told))
    });
    parts.ok_or_else(|| Error::Rank { rank, message: "sent a message without a kind".into() })
}
