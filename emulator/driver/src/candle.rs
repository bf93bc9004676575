//! Candle's own kernels (candle-kernels, `src/*.cu`), as far as candle-sam-lora meets them between its operations.

use crate::element::{Arguments, Element, Layouts};
use std::ffi::c_void;

pub type Work = Box<dyn Fn() + Send + Sync>;

/// A launch of candle's kernel of this name; none if the kernel is not known here.
///
/// # Safety
/// The arguments are those that the kernel takes; their addresses stay live until the work is done.
pub unsafe fn kernel(
    name: &str,
    grid: [u32; 3],
    block: [u32; 3],
    arguments: *const *const c_void,
) -> Option<Work> {
    let arguments = &Arguments(arguments);
    let (family, element) = name.rsplit_once('_')?;
    let element = Element::named(element)?;
    // SAFETY: the arguments are read as the kernel of this name takes them.
    unsafe {
        if let Some(from) = family.strip_prefix("cast_") {
            return Some(map(arguments, Element::named(from)?, element, |x| x));
        }
        if let Some(condition) = family.strip_prefix("where_") {
            return Some(select(arguments, Element::named(condition)?, element));
        }
        if let Some(index) = family.strip_prefix("is_") {
            return Some(index_select(arguments, Element::named(index)?, element));
        }
        if let Some(index) = family.strip_prefix("ia_") {
            return Some(index_add(arguments, Element::named(index)?, element));
        }
        if let Some(f) = unary(family) {
            return Some(map(arguments, element, element, f));
        }
        if let Some(f) = arithmetic(family) {
            return Some(binary(arguments, element, element, f));
        }
        if let Some(f) = comparison(family) {
            return Some(binary(arguments, element, Element::U8, move |a, b| f(&a, &b).into()));
        }
        Some(match family {
            "affine" => {
                let (mul, add) = (arguments.scalar(5, element), arguments.scalar(6, element));
                map(arguments, element, element, move |x| x * mul + add)
            }
            "upowf" => {
                let power = arguments.scalar(3, element);
                map_from(arguments, 4, element, element, move |x| x.powf(power))
            }
            "const_set" => const_set(arguments, element),
            "copy2d" => copy_2d(arguments, element),
            "fast_sum" => reduce(arguments, element, grid[0] as usize, 0.0, |a, b| a + b),
            "fast_max" => reduce(arguments, element, grid[0] as usize, f64::NEG_INFINITY, f64::max),
            // Its first argument is the number of sums; the last block has the rest of them.
            "fast_sum_small" => {
                let count: usize = arguments.at(0);
                debug_assert!(count <= (grid[0] * block[0]) as usize);
                reduce(arguments, element, count, 0.0, |a, b| a + b)
            }
            "im2col" => im2col(arguments, element),
            _ => return None,
        })
    }
}

fn unary(family: &str) -> Option<fn(f64) -> f64> {
    Some(match family {
        "ucopy" => |x| x,
        "uneg" => |x| -x,
        "uabs" => f64::abs,
        "uexp" => f64::exp,
        "ulog" => f64::ln,
        "usin" => f64::sin,
        "ucos" => f64::cos,
        "utanh" => f64::tanh,
        "usqr" => |x| x * x,
        "usqrt" => f64::sqrt,
        "urecip" => f64::recip,
        "urelu" => |x| x.max(0.0),
        "uerf" => libm::erf,
        "ugelu_erf" => |x| 0.5 * x * (1.0 + libm::erf(x * std::f64::consts::FRAC_1_SQRT_2)),
        "usigmoid" => |x| 1.0 / (1.0 + (-x).exp()),
        _ => return None,
    })
}

fn arithmetic(family: &str) -> Option<fn(f64, f64) -> f64> {
    Some(match family {
        "badd" => |a, b| a + b,
        "bsub" => |a, b| a - b,
        "bmul" => |a, b| a * b,
        "bdiv" => |a, b| a / b,
        "bmaximum" => f64::max,
        "bminimum" => f64::min,
        _ => return None,
    })
}

fn comparison(family: &str) -> Option<fn(&f64, &f64) -> bool> {
    Some(match family {
        "eq" => f64::eq,
        "ne" => f64::ne,
        "lt" => f64::lt,
        "le" => f64::le,
        "gt" => f64::gt,
        "ge" => f64::ge,
        _ => return None,
    })
}

/// `(count, rank, info, in, out)`.
unsafe fn map(
    arguments: &Arguments,
    from: Element,
    to: Element,
    f: impl Fn(f64) -> f64 + Send + Sync + 'static,
) -> Work {
    // SAFETY: as `kernel`.
    unsafe { map_from(arguments, 3, from, to, f) }
}

/// `(count, rank, info, .., in, out)`; where there is no `in` it is `out`.
unsafe fn map_from(
    arguments: &Arguments,
    first: usize,
    from: Element,
    to: Element,
    f: impl Fn(f64) -> f64 + Send + Sync + 'static,
) -> Work {
    // SAFETY: as `kernel`.
    let (count, layouts, [x, y]) = unsafe {
        let tensors = [first, first + 1].map(|i| arguments.at::<u64>(i));
        (arguments.at::<usize>(0), Layouts::read(arguments, 1, 1), tensors)
    };
    Box::new(move || {
        for index in 0..count {
            // SAFETY: as `kernel`.
            unsafe {
                let value = match x {
                    0 => to.get(y, index),
                    x => from.get(x, layouts.offset(0, index)),
                };
                to.set(y, index, f(value));
            }
        }
    })
}

/// `(count, rank, info of both, a, b, out)`.
unsafe fn binary(
    arguments: &Arguments,
    from: Element,
    to: Element,
    f: impl Fn(f64, f64) -> f64 + Send + Sync + 'static,
) -> Work {
    // SAFETY: as `kernel`.
    let (count, layouts, [a, b, y]) = unsafe {
        let tensors = [3, 4, 5].map(|i| arguments.at::<u64>(i));
        (arguments.at::<usize>(0), Layouts::read(arguments, 1, 2), tensors)
    };
    Box::new(move || {
        for index in 0..count {
            // SAFETY: as `kernel`.
            unsafe {
                let a = from.get(a, layouts.offset(0, index));
                let b = from.get(b, layouts.offset(1, index));
                to.set(y, index, f(a, b));
            }
        }
    })
}

/// `(count, rank, info of all, condition, a, b, out)`: a where the condition is not 0, else b.
unsafe fn select(arguments: &Arguments, condition: Element, element: Element) -> Work {
    // SAFETY: as `kernel`.
    let (count, layouts, [which, a, b, y]) = unsafe {
        let tensors = [3, 4, 5, 6].map(|i| arguments.at::<u64>(i));
        (arguments.at::<usize>(0), Layouts::read(arguments, 1, 3), tensors)
    };
    Box::new(move || {
        for index in 0..count {
            // SAFETY: as `kernel`.
            unsafe {
                let chosen = match condition.get(which, layouts.offset(0, index)) {
                    0.0 => element.get(b, layouts.offset(2, index)),
                    _ => element.get(a, layouts.offset(1, index)),
                };
                element.set(y, index, chosen);
            }
        }
    })
}

/// `(count, rank, info of the indices, indices, in, out, left, dim of in, number of indices, right)`: of `in`, as
/// `[left, dim, right]`, the named ones of the middle.
unsafe fn index_select(arguments: &Arguments, index: Element, element: Element) -> Work {
    // SAFETY: as `kernel`.
    let (count, layouts, [indices, x, y], [dim, chosen, right]) = unsafe {
        let tensors = [3, 4, 5].map(|i| arguments.at::<u64>(i));
        let sizes = [7, 8, 9].map(|i| arguments.at::<usize>(i));
        (arguments.at::<usize>(0), Layouts::read(arguments, 1, 1), tensors, sizes)
    };
    Box::new(move || {
        for at in 0..count {
            let (left, middle) = (at / right / chosen, at / right % chosen);
            // SAFETY: as `kernel`.
            unsafe {
                let row = index.get(indices, layouts.offset(0, middle)) as usize;
                element.set(y, at, element.get(x, (left * dim + row) * right + at % right));
            }
        }
    })
}

/// `(indices, number of them, in, out, left, _, dim of out, right)`: adds `in` to the named ones of the middle of
/// `out`, as `[left, dim, right]`.
unsafe fn index_add(arguments: &Arguments, index: Element, element: Element) -> Work {
    // SAFETY: as `kernel`.
    let ([indices, x, y], [chosen, left, dim, right]) = unsafe {
        let sizes = [1, 4, 6, 7].map(|i| arguments.at::<usize>(i));
        ([0, 2, 3].map(|i| arguments.at::<u64>(i)), sizes)
    };
    Box::new(move || {
        for at in 0..left * chosen * right {
            let (left, middle) = (at / right / chosen, at / right % chosen);
            // SAFETY: as `kernel`.
            unsafe {
                let row = index.get(indices, middle) as usize;
                let to = (left * dim + row) * right + at % right;
                element.set(y, to, element.get(y, to) + element.get(x, at));
            }
        }
    })
}

/// `(_, length, rank, info, in, out)`: each result of so many elements one after the other.
unsafe fn reduce(
    arguments: &Arguments,
    element: Element,
    results: usize,
    first: f64,
    f: fn(f64, f64) -> f64,
) -> Work {
    // SAFETY: as `kernel`.
    let (length, layouts, [x, y]) = unsafe {
        let tensors = [4, 5].map(|i| arguments.at::<u64>(i));
        (arguments.at::<usize>(1), Layouts::read(arguments, 2, 1), tensors)
    };
    Box::new(move || {
        for result in 0..results {
            let of = result * length..(result + 1) * length;
            // SAFETY: as `kernel`.
            unsafe {
                let values = of.map(|index| element.get(x, layouts.offset(0, index)));
                element.set(y, result, values.fold(first, f));
            }
        }
    })
}

/// `(count, rank, info, value, out)`: the strides are those of `out`.
unsafe fn const_set(arguments: &Arguments, element: Element) -> Work {
    // SAFETY: as `kernel`.
    let (count, layouts, value, y) = unsafe {
        let value = arguments.scalar(3, element);
        (arguments.at::<usize>(0), Layouts::read(arguments, 1, 1), value, arguments.at::<u64>(4))
    };
    Box::new(move || {
        for index in 0..count {
            // SAFETY: as `kernel`.
            unsafe { element.set(y, layouts.offset(0, index), value) };
        }
    })
}

/// `(in, out, rows, columns, stride of in's rows, of out's)`.
unsafe fn copy_2d(arguments: &Arguments, element: Element) -> Work {
    // SAFETY: as `kernel`.
    let ([x, y], [rows, columns, from, to]) = unsafe {
        let sizes = [2, 3, 4, 5].map(|i| arguments.at::<u32>(i) as usize);
        ([0, 1].map(|i| arguments.at::<u64>(i)), sizes)
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

/// `(count, h_out, w_out, h_k, w_k, stride, padding, dilation, info, in, out)`: `in` is `[batch, channels, h, w]` with
/// the sizes and strides of `info`, `out` is `[batch, h_out, w_out, channels, h_k, w_k]`.
unsafe fn im2col(arguments: &Arguments, element: Element) -> Work {
    // SAFETY: as `kernel`.
    let (count, sizes, info, [x, y]) = unsafe {
        let sizes: [usize; 7] = std::array::from_fn(|i| arguments.at(i + 1));
        let info = arguments.at::<*const [usize; 8]>(8).read();
        (arguments.at::<usize>(0), sizes, info, [9, 10].map(|i| arguments.at::<u64>(i)))
    };
    Box::new(move || {
        let [h_out, w_out, h_k, w_k, stride, padding, dilation] = sizes;
        let [_, channels, h, w, strides @ ..] = info;
        for at in 0..count {
            let mut rest = at;
            let mut next = |dim: usize| {
                let index = rest % dim;
                rest /= dim;
                index
            };
            let (kw, kh, channel) = (next(w_k), next(h_k), next(channels));
            let (column, row, image) = (next(w_out), next(h_out), rest);
            let (i, j) = (row * stride + kh * dilation, column * stride + kw * dilation);
            let inside = (padding..padding + h).contains(&i) && (padding..padding + w).contains(&j);
            // SAFETY: as `kernel`.
            unsafe {
                let value = if inside {
                    let index = [image, channel, i - padding, j - padding];
                    let offset = index.iter().zip(strides).map(|(i, stride)| i * stride).sum();
                    element.get(x, offset)
                } else {
                    0.0
                };
                element.set(y, at, value);
            }
        }
    })
}
