//! What candle makes of cuBLAS and cuRAND when it opens a device. Nothing is computed by them.

use crate::{Status, SUCCESS};

/// Any but null.
const HANDLE: usize = 1;

#[no_mangle]
unsafe extern "C" fn cublasCreate_v2(handle: *mut usize) -> Status {
    // SAFETY: the caller's address is one to write to.
    unsafe { *handle = HANDLE };
    SUCCESS
}

#[no_mangle]
extern "C" fn cublasDestroy_v2(_handle: usize) -> Status {
    SUCCESS
}

#[no_mangle]
extern "C" fn cublasSetStream_v2(_handle: usize, _stream: usize) -> Status {
    SUCCESS
}

#[no_mangle]
unsafe extern "C" fn curandCreateGenerator(generator: *mut usize, _kind: i32) -> Status {
    // SAFETY: the caller's address is one to write to.
    unsafe { *generator = HANDLE };
    SUCCESS
}

#[no_mangle]
extern "C" fn curandDestroyGenerator(_generator: usize) -> Status {
    SUCCESS
}

#[no_mangle]
extern "C" fn curandSetStream(_generator: usize, _stream: usize) -> Status {
    SUCCESS
}

#[no_mangle]
extern "C" fn curandSetPseudoRandomGeneratorSeed(_generator: usize, _seed: u64) -> Status {
    SUCCESS
}
