//! Streams and graphs. Work is done where it is submitted, or, while its stream is captured, kept for replays.

use crate::memory::{self, Stream};
use crate::{
    calls, dry_run, told, Outcome, Status, INVALID_VALUE, STREAM_CAPTURE_INVALIDATED,
    STREAM_CAPTURE_UNSUPPORTED, SUCCESS,
};
use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Instant;

const AUTO_FREE_ON_LAUNCH: u64 = 1;

type Work = Box<dyn Fn() -> Outcome + Send + Sync>;

/// Work of a stream while it was captured.
#[derive(Default)]
struct Graph {
    work: Vec<Work>,
    /// Allocated while it was captured: the graph's own, until it is destroyed.
    memory: Vec<u64>,
    /// The part of `memory` that nobody has given back yet.
    kept: Vec<u64>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        for &address in &self.memory {
            told(memory::disown(address).and_then(|()| memory::free(address)));
        }
    }
}

fn captures<T>(change: impl FnOnce(&mut HashMap<Stream, Graph>) -> T) -> T {
    static CAPTURES: OnceLock<Mutex<HashMap<Stream, Graph>>> = OnceLock::new();
    let captures = CAPTURES.get_or_init(Default::default);
    change(&mut captures.lock().unwrap_or_else(PoisonError::into_inner))
}

pub fn is_capturing(stream: Stream) -> bool {
    captures(|captures| captures.contains_key(&stream))
}

/// Does the work, or keeps it; a dry run does neither.
pub fn submit(stream: Stream, work: impl Fn() -> Outcome + Send + Sync + 'static) -> Outcome {
    if dry_run::is_on() {
        return Ok(());
    }
    let now = captures(|captures| match captures.get_mut(&stream) {
        Some(graph) => {
            graph.work.push(Box::new(work));
            None
        }
        None => Some(work),
    });
    now.map_or(Ok(()), |work| work())
}

/// Memory that a graph has if its stream is captured.
pub fn allocated(stream: Stream, address: u64) {
    captures(|captures| {
        if let Some(graph) = captures.get_mut(&stream) {
            memory::own(address);
            graph.memory.push(address);
            graph.kept.push(address);
        }
    });
}

/// Gives memory back in a graph; none if its stream is not captured.
pub fn freed(stream: Stream, address: u64) -> Option<Outcome> {
    captures(|captures| {
        let graph = captures.get_mut(&stream)?;
        let kept = graph.kept.len();
        graph.kept.retain(|&other| other != address);
        Some(match graph.kept.len() < kept {
            true => Ok(()),
            false => Err((INVALID_VALUE, "a graph frees what is not its own".into())),
        })
    })
}

#[no_mangle]
extern "C" fn cuStreamBeginCapture_v2(stream: Stream, _mode: i32) -> Status {
    captures(|captures| captures.insert(stream, Graph::default()));
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuStreamEndCapture(stream: Stream, graph: *mut *mut Arc<Graph>) -> Status {
    let captured = captures(|captures| captures.remove(&stream));
    told(match captured {
        None => Err((STREAM_CAPTURE_INVALIDATED, "no capture to end".into())),
        Some(captured) => {
            // SAFETY: the caller's address is one to write to.
            unsafe { *graph = Box::into_raw(Box::new(Arc::new(captured))) };
            Ok(())
        }
    })
}

#[no_mangle]
unsafe extern "C" fn cuStreamIsCapturing(stream: Stream, status: *mut i32) -> Status {
    calls::count("cuStreamIsCapturing");
    // SAFETY: the caller's address is one to write to.
    unsafe { *status = is_capturing(stream).into() };
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuGraphInstantiateWithFlags(
    executable: *mut *mut Arc<Graph>,
    graph: *mut Arc<Graph>,
    flags: u64,
) -> Status {
    // SAFETY: the graph is one of `cuStreamEndCapture`'s, not yet destroyed.
    let graph = unsafe { Arc::clone(&*graph) };
    told(match graph.kept.len() {
        // Memory still allocated at a launch's end would be in the way of the next one.
        kept if kept > 0 && flags & AUTO_FREE_ON_LAUNCH == 0 => {
            Err((INVALID_VALUE, format!("a graph does not free {kept} of its allocations")))
        }
        _ => {
            // SAFETY: the caller's address is one to write to.
            unsafe { *executable = Box::into_raw(Box::new(graph)) };
            Ok(())
        }
    })
}

#[no_mangle]
unsafe extern "C" fn cuGraphLaunch(executable: *mut Arc<Graph>, _stream: Stream) -> Status {
    calls::count("cuGraphLaunch");
    // SAFETY: one of `cuGraphInstantiateWithFlags`', not yet destroyed.
    let graph = unsafe { &*executable };
    told(graph.work.iter().try_for_each(|work| work()))
}

#[no_mangle]
unsafe extern "C" fn cuGraphExecDestroy(executable: *mut Arc<Graph>) -> Status {
    // SAFETY: made by `Box::into_raw`, and destroyed once.
    drop(unsafe { Box::from_raw(executable) });
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuGraphDestroy(graph: *mut Arc<Graph>) -> Status {
    // SAFETY: made by `Box::into_raw`, and destroyed once.
    drop(unsafe { Box::from_raw(graph) });
    SUCCESS
}

/// A handle that is not one of the streams that are always there.
#[no_mangle]
unsafe extern "C" fn cuStreamCreate(stream: *mut Stream, _flags: u32) -> Status {
    static NEXT: AtomicUsize = AtomicUsize::new(16);
    // SAFETY: the caller's address is one to write to.
    unsafe { *stream = NEXT.fetch_add(1, Ordering::Relaxed) };
    SUCCESS
}

#[no_mangle]
extern "C" fn cuStreamDestroy_v2(_stream: Stream) -> Status {
    SUCCESS
}

#[no_mangle]
extern "C" fn cuStreamSynchronize(stream: Stream) -> Status {
    calls::count("cuStreamSynchronize");
    told(match is_capturing(stream) {
        true => Err((STREAM_CAPTURE_UNSUPPORTED, "waiting for a stream that is captured".into())),
        false => Ok(()),
    })
}

#[no_mangle]
extern "C" fn cuStreamWaitEvent(_stream: Stream, _event: usize, _flags: u32) -> Status {
    calls::count("cuStreamWaitEvent");
    SUCCESS
}

/// When each event was recorded, in seconds since the first one: work is done where it is submitted, so the host's
/// clock is the stream's.
fn events<T>(change: impl FnOnce(&mut HashMap<usize, f64>) -> T) -> T {
    static EVENTS: OnceLock<Mutex<HashMap<usize, f64>>> = OnceLock::new();
    change(&mut EVENTS.get_or_init(Default::default).lock().unwrap_or_else(PoisonError::into_inner))
}

#[no_mangle]
unsafe extern "C" fn cuEventCreate(event: *mut usize, _flags: u32) -> Status {
    static NEXT: AtomicUsize = AtomicUsize::new(1);
    // SAFETY: the caller's address is one to write to.
    unsafe { *event = NEXT.fetch_add(1, Ordering::Relaxed) };
    SUCCESS
}

#[no_mangle]
extern "C" fn cuEventRecord(event: usize, _stream: Stream) -> Status {
    calls::count("cuEventRecord");
    static START: OnceLock<Instant> = OnceLock::new();
    let now = START.get_or_init(Instant::now).elapsed().as_secs_f64();
    events(|events| events.insert(event, now));
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cuEventElapsedTime_v2(ms: *mut f32, start: usize, end: usize) -> Status {
    let times = events(|events| [start, end].map(|event| events.get(&event).copied()));
    told(match times {
        [Some(start), Some(end)] => {
            // SAFETY: the caller's address is one to write to.
            unsafe { *ms = (1e3 * (end - start)) as f32 };
            Ok(())
        }
        _ => Err((INVALID_VALUE, "time between events that were not recorded".into())),
    })
}

/// As drivers before CUDA 13 have it.
#[no_mangle]
unsafe extern "C" fn cuEventElapsedTime(ms: *mut f32, start: usize, end: usize) -> Status {
    // SAFETY: as the caller promises.
    unsafe { cuEventElapsedTime_v2(ms, start, end) }
}

#[no_mangle]
extern "C" fn cuEventSynchronize(_event: usize) -> Status {
    SUCCESS
}

#[no_mangle]
extern "C" fn cuEventDestroy_v2(event: usize) -> Status {
    events(|events| events.remove(&event));
    SUCCESS
}
