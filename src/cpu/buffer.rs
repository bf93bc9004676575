//! Large buffers: on huge pages, and used again.
//!
//! The first touch of a fresh page is a fault, which costs hundreds of times more than the writing. An operation's
//! output is thousands of pages. So a large buffer asks for huge pages where the kernel gives them on request (Linux,
//! `transparent_hugepage` at `madvise`). A dropped buffer waits for the next that needs its size. [`release`] gives
//! back what waits.

use bytemuck::Zeroable;
use half::bf16;
use std::fmt::Debug;
use std::ops::{Deref, DerefMut};
use std::sync::{Mutex, PoisonError};

/// Below this, in bytes, a buffer is an ordinary vector.
const LARGE: usize = 1 << 19;
/// From this on, in bytes, one asks for huge pages: two of them.
const HUGE: usize = 1 << 22;

/// Bytes that wait, at most: 2 GiB.
const MOST: usize = 1 << 31;

/// Dropped large buffers.
static WAITING: Mutex<Waiting> = Mutex::new(Waiting { f32: Vec::new(), bf16: Vec::new() });

/// Dropped large buffers of each type of element.
pub struct Waiting {
    f32: Vec<Vec<f32>>,
    bf16: Vec<Vec<bf16>>,
}

/// An element of buffers.
pub trait Pooled: Copy + Debug + Default + Send + Sync + Zeroable + 'static {
    /// The buffers of this type that wait for their next use.
    fn waiting(waiting: &mut Waiting) -> &mut Vec<Vec<Self>>;
}

impl Pooled for f32 {
    fn waiting(waiting: &mut Waiting) -> &mut Vec<Vec<f32>> {
        &mut waiting.f32
    }
}

impl Pooled for bf16 {
    fn waiting(waiting: &mut Waiting) -> &mut Vec<Vec<bf16>> {
        &mut waiting.bf16
    }
}

impl Waiting {
    fn bytes(&self) -> usize {
        self.f32.iter().map(bytes).sum::<usize>() + self.bf16.iter().map(bytes).sum::<usize>()
    }
}

/// Bytes that a vector holds.
fn bytes<T>(values: &Vec<T>) -> usize {
    values.capacity() * size_of::<T>()
}

/// Elements that go back to where they came from when dropped.
#[derive(Debug, Default)]
pub struct Elements<T: Pooled>(Vec<T>);

/// Elements in f32.
pub type Buffer = Elements<f32>;

impl<T: Pooled> Elements<T> {
    /// `len` zeros.
    pub fn zeros(len: usize) -> Self {
        let mut buffer = Self::any(len);
        if is_large::<T>(len) {
            buffer.0.fill(T::default());
        }
        buffer
    }

    /// `len` numbers, whichever: to be overwritten.
    pub fn any(len: usize) -> Self {
        if !is_large::<T>(len) {
            return Self(bytemuck::zeroed_vec(len));
        }
        let mut guard = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = T::waiting(&mut guard);
        // The smallest that fits, if it wastes little.
        let fits = len..=len + len / 4;
        let fitting = waiting.iter().enumerate().filter(|(_, b)| fits.contains(&b.capacity()));
        if let Some((index, _)) = fitting.min_by_key(|(_, b)| b.capacity()) {
            let mut buffer = waiting.swap_remove(index);
            buffer.resize(len, T::default());
            return Self(buffer);
        }
        drop(guard);
        let mut buffer = bytemuck::zeroed_vec(len);
        if bytes(&buffer) >= HUGE {
            ask_for_huge_pages(&mut buffer);
        }
        Self(buffer)
    }

    /// The numbers, for good.
    pub fn into_vec(mut self) -> Vec<T> {
        std::mem::take(&mut self.0)
    }
}

/// Whether elements so many are a large buffer.
fn is_large<T>(len: usize) -> bool {
    len * size_of::<T>() >= LARGE
}

impl<T: Pooled> Drop for Elements<T> {
    fn drop(&mut self) {
        if is_large::<T>(self.0.len()) {
            let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
            if waiting.bytes() + bytes(&self.0) <= MOST {
                T::waiting(&mut waiting).push(std::mem::take(&mut self.0));
            }
        }
    }
}

impl<T: Pooled> Deref for Elements<T> {
    type Target = [T];

    fn deref(&self) -> &[T] {
        &self.0
    }
}

impl<T: Pooled> DerefMut for Elements<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        &mut self.0
    }
}

/// Gives the memory that the CPU operations keep for their next buffers, 2 GiB at most, back to the system.
///
/// [Example](crate::device())
pub fn release() {
    let mut waiting = WAITING.lock().unwrap_or_else(PoisonError::into_inner);
    *waiting = Waiting { f32: Vec::new(), bf16: Vec::new() };
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages<T>(buffer: &mut [T]) {
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
fn ask_for_huge_pages<T>(_buffer: &mut [T]) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn zeros_are_zero_however_often() {
        fn check<T: Pooled + PartialEq>(len: usize, one: T) {
            for _ in 0..2 {
                let mut buffer = Elements::zeros(len);
                let zero = buffer.iter().all(|&x: &T| x == T::default());
                assert!(buffer.len() == len && zero, "{len}");
                buffer.fill(one);
            }
        }
        const LARGE: usize = super::LARGE / 4;
        for len in [0, 5, LARGE, LARGE + 3, 2 * LARGE + 1] {
            check(len, 1f32);
            check(2 * len, bf16::ONE);
        }
        release();
    }
}
