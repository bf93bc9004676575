//! Large buffers of zeros on huge pages.
//!
//! A fresh page costs a fault when it is first touched, hundreds of times more than writing it; an operation's output is
//! thousands of them. Where the kernel gives huge pages to those that ask for them (Linux, `transparent_hugepage` at
//! `madvise`), asking makes it 512 times fewer faults. Elsewhere nothing changes.

/// Below this, in bytes, a buffer is left alone: it would hold no whole huge page, or hardly more.
const LARGE: usize = 4 << 20;

/// `len` zeros.
pub fn zeros<T: Copy + Default>(len: usize) -> Vec<T> {
    let mut buffer = vec![T::default(); len];
    if std::mem::size_of_val(buffer.as_slice()) >= LARGE {
        ask_for_huge_pages(&mut buffer);
    }
    buffer
}

#[cfg(target_os = "linux")]
fn ask_for_huge_pages<T>(buffer: &mut [T]) {
    use rustix::mm::{madvise, Advice};
    let page = rustix::param::page_size();
    let bytes = buffer.as_mut_ptr_range();
    let (start, end) = (bytes.start.cast::<u8>(), bytes.end.cast::<u8>());
    let before = start.addr() % page;
    let length = (end.addr() - start.addr() + before).next_multiple_of(page);
    // SAFETY: every page of the range holds a part of the buffer and is therefore mapped; the advice is about how
    // pages are backed and changes no content, neither of the buffer nor of its neighbours on the first and last
    // page.
    let asked = unsafe { madvise(start.wrapping_sub(before).cast(), length, Advice::LinuxHugepage) };
    // A kernel without huge pages refuses, which costs nothing but the faults.
    let _ = asked;
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages<T>(_buffer: &mut [T]) {}

#[cfg(test)]
mod tests {
    use super::zeros;

    #[test]
    fn small_and_large_buffers_are_zero_and_writable() {
        for len in [0, 5, (4 << 20) + 3, 9 << 20] {
            let mut buffer: Vec<f32> = zeros(len);
            assert!(buffer.len() == len && buffer.iter().all(|&x| x == 0.0), "{len}");
            buffer.fill(1.0);
            assert!(buffer.iter().all(|&x| x == 1.0), "{len}");
        }
    }
}
