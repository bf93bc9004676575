//! Threads in the place of processes.

use candle_sam_lora::train::Communicator;
use candle_sam_lora::Result;
use std::collections::VecDeque;
use std::sync::{Arc, Barrier, Mutex, PoisonError};

/// Bytes that the ranks gave for each other, `[from][to]`.
type Pieces = Mutex<Vec<Vec<Vec<u8>>>>;

/// Messages that were sent to each thread, with their senders.
type Letters = Arc<Vec<Mutex<VecDeque<(usize, Vec<u8>)>>>>;

/// One of several threads that work together.
#[derive(Debug)]
pub struct Threads {
    rank: usize,
    pieces: Arc<Pieces>,
    letters: Letters,
    barrier: Arc<Barrier>,
}

impl Communicator for Threads {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        self.pieces.lock().unwrap_or_else(PoisonError::into_inner).len()
    }

    fn all_gather(&self, own: &[u8]) -> Result<Vec<Vec<u8>>> {
        self.all_to_all(&vec![own; self.size()])
    }

    fn all_to_all(&self, pieces: &[&[u8]]) -> Result<Vec<Vec<u8>>> {
        let lock = || self.pieces.lock().unwrap_or_else(PoisonError::into_inner);
        lock()[self.rank] = pieces.iter().map(|piece| piece.to_vec()).collect();
        self.barrier.wait();
        let received = lock().iter().map(|from| from[self.rank].clone()).collect();
        // Nobody may give anew before all have taken.
        self.barrier.wait();
        Ok(received)
    }

    fn send(&self, rank: usize, bytes: &[u8]) -> Result<()> {
        let letter = (self.rank, bytes.to_vec());
        self.letters[rank].lock().unwrap_or_else(PoisonError::into_inner).push_back(letter);
        Ok(())
    }

    fn receive(&self) -> Result<Option<(usize, Vec<u8>)>> {
        Ok(self.letters[self.rank].lock().unwrap_or_else(PoisonError::into_inner).pop_front())
    }
}

/// Results of `work` on each of `size` threads, by rank.
pub fn on_threads<T: Send>(
    size: usize,
    work: impl Fn(Arc<dyn Communicator>) -> T + Sync,
) -> Vec<T> {
    let pieces = Arc::new(Mutex::new(vec![vec![]; size]));
    let letters: Letters = Arc::new((0..size).map(|_| Mutex::default()).collect());
    let barrier = Arc::new(Barrier::new(size));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..size)
            .map(|rank| {
                let (pieces, letters) = (pieces.clone(), letters.clone());
                let own = Threads { rank, pieces, letters, barrier: barrier.clone() };
                let work = &work;
                scope.spawn(move || work(Arc::new(own)))
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank panicked")).collect()
    })
}
