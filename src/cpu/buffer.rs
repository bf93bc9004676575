//! Large buffers: on huge pages, and used again.
//!
//! The first touch of a fresh page is a fault, which costs hundreds of times more than the writing. An operation's
//! output is thousands of pages. So a large buffer asks for huge pages where the kernel gives them on request (Linux,
//! `transparent_hugepage` at `madvise`). A dropped buffer waits for the next that needs its size. [`release`] gives
//! back what waits.

use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Below this, in elements, a buffer is an ordinary vector.
const LARGE: usize = 1 << 17;
/// From this on, in elements, one asks for huge pages: two of them.
const HUGE: usize = 1 << 20;

/// Elements that wait, at most: 2 GiB.
const MOST: usize = 1 << 29;

/// Dropped large buffers.
static WAITING: Mutex<Vec<Vec<f32>>> = Mutex::new(Vec::new());

/// Numbers that go back to where they came from when dropped.
#[derive(Debug, Default)]
pub struct Buffer(Vec<f32>);

impl Buffer {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::any(len);
        if buffer.0.len() >= LARGE {
            buffer.0.fill(0.0);
        }
        buffer
    }

    /// `len` numbers, whichever: to be overwritten.
    pub fn any(len: usize) -> Self {
        if len < LARGE {
            return Self(vec![0.0; len]);
        }
        let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        // The smallest that fits, if it wastes little.
        let fits = len..=len + len / 4;
        let fitting = waiting.iter().enumerate().filter(|(_, b)| fits.contains(&b.capacity()));
        if let Some((index, _)) = fitting.min_by_key(|(_, b)| b.capacity()) {
            let mut buffer = waiting.swap_remove(index);
            buffer.resize(len, 0.0);
            return Self(buffer);
        }
        drop(waiting);
        let mut buffer = vec![0.0; len];
        if len >= HUGE {
            ask_for_huge_pages(&mut buffer);
        }
        Self(buffer)
    }

    /// The numbers, for good.
    pub fn into_vec(mut self) -> Vec<f32> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.0.len() >= LARGE {
            let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
            let elements: usize = waiting.iter().chain([&self.0]).map(Vec::capacity).sum();
            if elements <= MOST {
                waiting.push(std::mem::take(&mut self.0));
            }
        }
    }
}

impl Deref for Buffer {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.0
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [f32] {
        &mut self.0
    }
}

/// Gives the memory that the CPU operations keep for their next buffers, 2 GiB at most, back to the system.
pub fn release() {
    WAITING.lock().unwrap_or_else(PoisonError::into_inner).clear();
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages(buffer: &mut [f32]) {
    use rustix::mm::{madvise, Advice};
    let page = rustix::param::page_size();
    let bytes = buffer.as_mut_ptr_range();
    let (start, end) = (bytes.start.cast::<u8>(), bytes.end.cast::<u8>());
    let before = start.addr() % page;
    let length = (end.addr() - start.addr() + before).next_multiple_of(page);
    // SAFETY: every page of the range holds a part of the buffer and is therefore mapped. The advice is about how pages
    // are backed. It changes no content, neither of the buffer nor of its neighbours on the first and last page.
    let asked =
        unsafe { madvise(start.wrapping_sub(before).cast(), length, Advice::LinuxHugepage) };
    // A kernel without huge pages refuses, which costs nothing but the faults.
    let _ = asked;
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_buffer: &mut [f32]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_zero_however_often() {
        for len in [0, 5, LARGE, LARGE + 3, 2 * LARGE + 1] {
            for _ in 0..2 {
                let mut buffer = Buffer::zeros(len);
                assert!(buffer.len() == len && buffer.iter().all(|&x| x == 0.0), "{len}");
                buffer.fill(1.0);
            }
        }
        release();
    }
}
