//! Of candle's own kernels (candle-kernels, `src/*.cu`) those that copy, convert, scale and add: what lies between the
//! operations of candle-sam-lora. Elements go through f64, which holds every type's values but the largest integers.

use half::{bf16, f16};
use std::ffi::c_void;

/// An element's type, by the end of a kernel's name.
#[derive(Clone, Copy)]
enum Element {
    F32,
    F64,
    F16,
    BF16,
    U8,
    U32,
    I64,
}

impl Element {
    fn named(name: &str) -> Option<Self> {
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

    /// # Safety
    /// There is such an element at this index.
    unsafe fn get(self, at: u64, index: usize) -> f64 {
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
    unsafe fn set(self, at: u64, index: usize, value: f64) {
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

/// A kernel's arguments, of which each has a type that only its name tells.
struct Arguments(*const *const c_void);

impl Arguments {
    /// # Safety
    /// There is an argument of this type at this index.
    unsafe fn at<T: Copy>(&self, index: usize) -> T {
        // SAFETY: the caller's promise.
        unsafe { (*self.0.add(index)).cast::<T>().read() }
    }
}

/// Sizes of `info`, which has `1 + tensors` times as many numbers as there are dimensions: sizes, then strides; null for
/// contiguous tensors. Copied: candle frees them in the stream's order.
#[derive(Clone)]
struct Info {
    count: usize,
    dims: Vec<usize>,
    strides: Vec<Vec<usize>>,
}

impl Info {
    /// # Safety
    /// The first three arguments are the number of elements, that of dimensions, and `info`.
    unsafe fn read(arguments: &Arguments, tensors: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            let (count, rank) = (arguments.at::<usize>(0), arguments.at::<usize>(1));
            let info = arguments.at::<*const usize>(2);
            if info.is_null() {
                return Self { count, dims: vec![count], strides: vec![vec![1]; tensors] };
            }
            let part = |i: usize| std::slice::from_raw_parts(info.add(i * rank), rank).to_vec();
            Self { count, dims: part(0), strides: (1..=tensors).map(part).collect() }
        }
    }

    /// Where the element of this index lies in one of the tensors.
    fn offset(&self, tensor: usize, mut index: usize) -> usize {
        let mut offset = 0;
        for (dim, stride) in self.dims.iter().zip(&self.strides[tensor]).rev() {
            offset += index % dim * stride;
            index /= dim;
        }
        offset
    }
}

type Work = Box<dyn Fn() + Send + Sync>;

/// A launch of candle's kernel of this name; none if it is not one of those that are known.
///
/// # Safety
/// The arguments are those that the kernel takes; their addresses stay live until the work is done.
pub unsafe fn kernel(name: &str, arguments: *const *const c_void) -> Option<Work> {
    let arguments = Arguments(arguments);
    let (family, element) = name.rsplit_once('_')?;
    let element = Element::named(element)?;
    // SAFETY: all reads and writes are those of the kernel of this name, whose arguments these are.
    unsafe {
        if let Some(from) = family.strip_prefix("cast_") {
            let from = Element::named(from)?;
            return Some(map(&arguments, from, element, |x| x));
        }
        Some(match family {
            "ucopy" => map(&arguments, element, element, |x| x),
            "uneg" => map(&arguments, element, element, |x| -x),
            "affine" => {
                let scalar = |index| element.get(*arguments.0.add(index) as u64, 0);
                let (mul, add) = (scalar(5), scalar(6));
                map(&arguments, element, element, move |x| x * mul + add)
            }
            "badd" => binary(&arguments, element, |a, b| a + b),
            "bsub" => binary(&arguments, element, |a, b| a - b),
            "bmul" => binary(&arguments, element, |a, b| a * b),
            "const_set" => const_set(&arguments, element),
            "copy2d" => copy_2d(&arguments, element),
            _ => return None,
        })
    }
}

/// `(count, rank, info, in, out)`, where no `in` is `out` itself.
unsafe fn map(
    arguments: &Arguments,
    from: Element,
    to: Element,
    f: impl Fn(f64) -> f64 + Send + Sync + 'static,
) -> Work {
    // SAFETY: as `kernel`.
    let (info, x, y) =
        unsafe { (Info::read(arguments, 1), arguments.at::<u64>(3), arguments.at::<u64>(4)) };
    Box::new(move || {
        for index in 0..info.count {
            // SAFETY: as `kernel`.
            unsafe {
                let value = match x {
                    0 => to.get(y, index),
                    x => from.get(x, info.offset(0, index)),
                };
                to.set(y, index, f(value));
            }
        }
    })
}

/// `(count, rank, info of both, a, b, out)`.
unsafe fn binary(
    arguments: &Arguments,
    element: Element,
    f: impl Fn(f64, f64) -> f64 + Send + Sync + 'static,
) -> Work {
    // SAFETY: as `kernel`.
    let (info, [a, b, y]) =
        unsafe { (Info::read(arguments, 2), [3, 4, 5].map(|i| arguments.at::<u64>(i))) };
    Box::new(move || {
        for index in 0..info.count {
            // SAFETY: as `kernel`.
            unsafe {
                let a = element.get(a, info.offset(0, index));
                let b = element.get(b, info.offset(1, index));
                element.set(y, index, f(a, b));
            }
        }
    })
}

/// `(count, rank, info, value, out)`: the strides are those of `out`.
unsafe fn const_set(arguments: &Arguments, element: Element) -> Work {
    // SAFETY: as `kernel`.
    let (info, value, y) = unsafe {
        let value = element.get(*arguments.0.add(3) as u64, 0);
        (Info::read(arguments, 1), value, arguments.at::<u64>(4))
    };
    Box::new(move || {
        for index in 0..info.count {
            // SAFETY: as `kernel`.
            unsafe { element.set(y, info.offset(0, index), value) };
        }
    })
}

/// `(in, out, rows, columns, stride of in's rows, of out's)`.
unsafe fn copy_2d(arguments: &Arguments, element: Element) -> Work {
    // SAFETY: as `kernel`.
    let ([x, y], [rows, columns, from, to]) = unsafe {
        (
            [0, 1].map(|i| arguments.at::<u64>(i)),
            [2, 3, 4, 5].map(|i| arguments.at::<u32>(i) as usize),
        )
    };
    Box::new(move || {
        for row in 0..rows {
            for column in 0..columns {
                // SAFETY: as `kernel`.
                unsafe { element.set(y, row * to + column, element.get(x, row * from + column)) };
            }
        }
    })
}
