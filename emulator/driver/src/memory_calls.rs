//! The driver's calls about memory: allocations and copies, done at once or kept by a graph.

use crate::memory::{alloc, check, free, Stream};
use crate::{calls, dry_run, graph, told, Outcome, Status, STREAM_CAPTURE_UNSUPPORTED, SUCCESS};

/// Copies within, to or from the device's memory; `ours` are the addresses in it.
fn copy(stream: Stream, to: u64, from: u64, bytes: usize, ours: &[u64]) -> Outcome {
    let host = ours.len() == 1;
    if host && graph::is_capturing(stream) {
        return Err((STREAM_CAPTURE_UNSUPPORTED, "a copy from or to the host in a graph".into()));
    }
    for &address in ours {
        check(address, bytes)?;
        calls::add("moved::copies", bytes as u64);
    }
    graph::submit(stream, move || {
        // SAFETY: checked where it is the device's, else the caller's promise; the two may be the same memory.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    })
}

#[no_mangle]
unsafe extern "C" fn cuMemAllocAsync(address: *mut u64, bytes: usize, stream: Stream) -> Status {
    calls::count("cuMemAllocAsync");
    told(alloc(bytes).map(|new| {
        graph::allocated(stream, new);
        // SAFETY: the caller's address is one to write to.
        unsafe { *address = new }
    }))
}

#[no_mangle]
unsafe extern "C" fn cuMemFreeAsync(address: u64, stream: Stream) -> Status {
    calls::count("cuMemFreeAsync");
    told(match graph::freed(stream, address) {
        Some(outcome) => outcome,
        None => free(address),
    })
}

#[no_mangle]
unsafe extern "C" fn cuMemcpyHtoDAsync_v2(
    to: u64,
    from: *const u8,
    bytes: usize,
    stream: Stream,
) -> Status {
    calls::count("cuMemcpyHtoDAsync_v2");
    told(copy(stream, to, from as u64, bytes, &[to]))
}

#[no_mangle]
unsafe extern "C" fn cuMemcpyDtoHAsync_v2(
    to: *mut u8,
    from: u64,
    bytes: usize,
    stream: Stream,
) -> Status {
    calls::count("cuMemcpyDtoHAsync_v2");
    if dry_run::is_on() {
        // SAFETY: the caller's memory, of this length.
        unsafe { to.write_bytes(0, bytes) };
    }
    told(copy(stream, to as u64, from, bytes, &[from]))
}

#[no_mangle]
unsafe extern "C" fn cuMemcpyDtoDAsync_v2(
    to: u64,
    from: u64,
    bytes: usize,
    stream: Stream,
) -> Status {
    calls::count("cuMemcpyDtoDAsync_v2");
    told(copy(stream, to, from, bytes, &[to, from]))
}

#[no_mangle]
unsafe extern "C" fn cuMemsetD8Async(to: u64, value: u8, bytes: usize, stream: Stream) -> Status {
    calls::count("cuMemsetD8Async");
    calls::add("moved::memsets", bytes as u64);
    told(check(to, bytes).and_then(|()| {
        graph::submit(stream, move || {
            // SAFETY: checked.
            unsafe { (to as *mut u8).write_bytes(value, bytes) };
            Ok(())
        })
    }))
}

#[no_mangle]
unsafe extern "C" fn cuDeviceGetDefaultMemPool(pool: *mut usize, _device: i32) -> Status {
    // SAFETY: the caller's address is one to write to.
    unsafe { *pool = 1 };
    SUCCESS
}

#[no_mangle]
extern "C" fn cuMemPoolSetAttribute(_pool: usize, _attribute: i32, _value: *mut u8) -> Status {
    SUCCESS
}
