//! The parts of cuBLAS and cuRAND that candle calls: products of matrices, and a generator that it opens and does not
//! use here.

use crate::element::Element;
use crate::memory::Stream;
use crate::{calls, graph, Status, SUCCESS};
use std::ffi::c_void;
use std::sync::atomic::{AtomicUsize, Ordering};

/// CUBLAS_STATUS_NOT_SUPPORTED and CUBLAS_STATUS_EXECUTION_FAILED: cuBLAS counts otherwise than the driver.
const NOT_SUPPORTED: Status = 15;
const EXECUTION_FAILED: Status = 13;

/// Handle of cuBLAS: the stream that it works in.
type Handle = AtomicUsize;

#[no_mangle]
unsafe extern "C" fn cublasCreate_v2(handle: *mut *mut Handle) -> Status {
    // SAFETY: the caller's address is one to write to.
    unsafe { *handle = Box::into_raw(Box::default()) };
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn cublasDestroy_v2(handle: *mut Handle) -> Status {
    // SAFETY: made by `Box::into_raw`, and destroyed once.
    drop(unsafe { Box::from_raw(handle) });
    SUCCESS
}

#[no_mangle]
extern "C" fn cublasSetStream_v2(handle: &Handle, stream: Stream) -> Status {
    handle.store(stream, Ordering::SeqCst);
    SUCCESS
}

/// By `cudaDataType`.
fn element(data_type: i32) -> Option<Element> {
    Some(match data_type {
        0 => Element::F32,
        1 => Element::F64,
        2 => Element::F16,
        14 => Element::BF16,
        _ => return None,
    })
}

/// A matrix in columns, or, transposed, in rows; one of a batch of them.
#[derive(Clone, Copy)]
struct Matrix {
    at: u64,
    element: Element,
    leading: usize,
    stride: usize,
    transposed: bool,
}

impl Matrix {
    fn index(&self, batch: usize, row: usize, column: usize) -> usize {
        let (row, column) = if self.transposed { (column, row) } else { (row, column) };
        batch * self.stride + column * self.leading + row
    }
}

/// `c = op(a) op(b)` for alpha = 1 and beta = 0, which is all that candle asks for.
#[no_mangle]
unsafe extern "C" fn cublasGemmStridedBatchedEx(
    handle: &Handle,
    transposed_a: i32,
    transposed_b: i32,
    m: i32,
    n: i32,
    k: i32,
    _alpha: *const c_void,
    a: u64,
    type_a: i32,
    leading_a: i32,
    stride_a: i64,
    b: u64,
    type_b: i32,
    leading_b: i32,
    stride_b: i64,
    _beta: *const c_void,
    c: u64,
    type_c: i32,
    leading_c: i32,
    stride_c: i64,
    batch: i32,
    _compute: i32,
    _algorithm: i32,
) -> Status {
    calls::count("cublasGemmStridedBatchedEx");
    let matrix = |at, data_type, leading: i32, stride: i64, transposed| {
        let (leading, stride) = (leading as usize, stride as usize);
        Some(Matrix { at, element: element(data_type)?, leading, stride, transposed })
    };
    let (Some(a), Some(b), Some(c)) = (
        matrix(a, type_a, leading_a, stride_a, transposed_a != 0),
        matrix(b, type_b, leading_b, stride_b, transposed_b != 0),
        matrix(c, type_c, leading_c, stride_c, false),
    ) else {
        return NOT_SUPPORTED;
    };
    let [m, n, k, batch] = [m, n, k, batch].map(|size| size as usize);
    let done = graph::submit(handle.load(Ordering::SeqCst), move || {
        for index in 0..batch * m * n {
            let (image, column, row) = (index / m / n, index / m % n, index % m);
            // SAFETY: the matrices are of these sizes, by the caller's promise.
            unsafe {
                let term = |i| {
                    a.element.get(a.at, a.index(image, row, i))
                        * b.element.get(b.at, b.index(image, i, column))
                };
                c.element.set(c.at, c.index(image, row, column), (0..k).map(term).sum());
            }
        }
        Ok(())
    });
    done.map_or(EXECUTION_FAILED, |()| SUCCESS)
}

#[no_mangle]
unsafe extern "C" fn curandCreateGenerator(generator: *mut usize, _kind: i32) -> Status {
    // SAFETY: the caller's address is one to write to.
    unsafe { *generator = 1 };
    SUCCESS
}

#[no_mangle]
extern "C" fn curandDestroyGenerator(_generator: usize) -> Status {
    SUCCESS
}

#[no_mangle]
extern "C" fn curandSetStream(_generator: usize, _stream: Stream) -> Status {
    SUCCESS
}

#[no_mangle]
extern "C" fn curandSetPseudoRandomGeneratorSeed(_generator: usize, _seed: u64) -> Status {
    SUCCESS
}
