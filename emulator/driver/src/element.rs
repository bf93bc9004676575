//! Elements of candle's tensors, and where they lie.

use half::{bf16, f16};
use std::ffi::c_void;

/// An element's type. Values go through f64, which holds all of them but the largest integers.
#[derive(Clone, Copy)]
pub enum Element {
    F32,
    F64,
    F16,
    BF16,
    U8,
    U32,
    I64,
}

impl Element {
    /// By the end of a kernel's name.
    pub fn named(name: &str) -> Option<Self> {
        Some(match name {
            "f32" => Self::F32,
            "f64" => Self::F64,
            "f16" => Self::F16,
            "bf16" => Self::BF16,
            "u8" => Self::U8,
            "u32" => Self::U32,
            "i64" => Self::I64,
            _ => return None,
        })
    }

    /// The size of one.
    pub fn bytes(self) -> u64 {
        match self {
            Self::U8 => 1,
            Self::F16 | Self::BF16 => 2,
            Self::F32 | Self::U32 => 4,
            Self::F64 | Self::I64 => 8,
        }
    }

    /// # Safety
    /// There is such an element at this index.
    pub unsafe fn get(self, at: u64, index: usize) -> f64 {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F32 => (at as *const f32).add(index).read().into(),
                Self::F64 => (at as *const f64).add(index).read(),
                Self::F16 => (at as *const f16).add(index).read().into(),
                Self::BF16 => (at as *const bf16).add(index).read().into(),
                Self::U8 => (at as *const u8).add(index).read().into(),
                Self::U32 => (at as *const u32).add(index).read().into(),
                Self::I64 => (at as *const i64).add(index).read() as f64,
            }
        }
    }

    /// # Safety
    /// There is room for such an element at this index.
    pub unsafe fn set(self, at: u64, index: usize, value: f64) {
        // SAFETY: the caller's promise.
        unsafe {
            match self {
                Self::F32 => (at as *mut f32).add(index).write(value as f32),
                Self::F64 => (at as *mut f64).add(index).write(value),
                Self::F16 => (at as *mut f16).add(index).write(f16::from_f64(value)),
                Self::BF16 => (at as *mut bf16).add(index).write(bf16::from_f64(value)),
                Self::U8 => (at as *mut u8).add(index).write(value as u8),
                Self::U32 => (at as *mut u32).add(index).write(value as u32),
                Self::I64 => (at as *mut i64).add(index).write(value as i64),
            }
        }
    }
}

/// A kernel's arguments. Only the kernel's name tells their types.
pub struct Arguments(pub *const *const c_void);

impl Arguments {
    /// # Safety
    /// There is an argument of this type at this index.
    pub unsafe fn at<T: Copy>(&self, index: usize) -> T {
        // SAFETY: the caller's promise.
        unsafe { self.0.add(index).read().cast::<T>().read() }
    }

    /// # Safety
    /// There is an argument of this element's type at this index.
    pub unsafe fn scalar(&self, index: usize, element: Element) -> f64 {
        // SAFETY: the caller's promise.
        unsafe { element.get(self.0.add(index).read() as u64, 0) }
    }
}

/// The layouts of a kernel's inputs, of one shape. The array `info` holds the sizes and then each input's strides; null
/// stands for contiguous inputs. It is copied, since candle frees it in the stream's order.
pub struct Layouts {
    dims: Vec<usize>,
    strides: Vec<Vec<usize>>,
}

impl Layouts {
    /// # Safety
    /// The arguments from this index on are the number of dimensions and `info`, for so many inputs.
    pub unsafe fn read(arguments: &Arguments, index: usize, inputs: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let rank: usize = arguments.at(index);
            let info: *const usize = arguments.at(index + 1);
            if info.is_null() {
                // One dimension, which no index reaches the end of.
                return Self { dims: vec![usize::MAX], strides: vec![vec![1]; inputs] };
            }
            let part = |i: usize| std::slice::from_raw_parts(info.add(i * rank), rank).to_vec();
            Self { dims: part(0), strides: (1..=inputs).map(part).collect() }
        }
    }

    /// Where the element of this index lies in one of the inputs.
    pub fn offset(&self, input: usize, mut index: usize) -> usize {
        let mut offset = 0;
        for (dim, stride) in self.dims.iter().zip(&self.strides[input]).rev() {
            offset += index % dim * stride;
            index /= dim;
        }
        offset
    }
}
