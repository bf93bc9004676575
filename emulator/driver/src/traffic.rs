//! Bytes that kernels beside products and attention move, in a dry run: each reads or writes each of its tensors once.
//!
//! A tensor is what remains of the live memory from its address on. So a view counts with what lies behind it, unless
//! the kernel says how many elements it takes.

use crate::element::{Arguments, Element};
use crate::memory;
use std::ffi::c_void;

/// The crate's kernels by the beginnings of their names, and the size of their params.
const KERNELS: [(&str, usize); 9] = [
    ("concat", 144),
    ("conv_columns", 56),
    ("dora_norm", 48),
    ("dropout", 48),
    ("layer_norm_bwd_weight", 48),
    ("layer_norm_bwd", 64),
    ("layer_norm_fwd", 48),
    ("projection_bwd_activation", 40),
    ("sum_partials", 32),
];

/// AdamW's elements of a chunk; their bytes as gradients, and as gradients, parameters and moments that are read and
/// written.
const ADAMW: (u64, [(&str, u64); 2]) = (2048, [("adamw_partials", 4), ("adamw_update", 28)]);

fn live(address: u64) -> u64 {
    memory::holding(address).map_or(0, |(start, length)| start + length as u64 - address)
}

/// Bytes that a kernel of the crate moves.
///
/// # Safety
/// The one argument is the params struct of the kernel of this name.
pub unsafe fn of_crate(name: &str, grid: [u32; 3], arguments: *const *const c_void) -> u64 {
    let (chunk, steps) = ADAMW;
    if let Some((_, bytes)) = steps.into_iter().find(|(kernel, _)| name.starts_with(kernel)) {
        return u64::from(grid[0]) * chunk * bytes;
    }
    let Some((_, size)) = KERNELS.into_iter().find(|(kernel, _)| name.starts_with(kernel)) else {
        return 0;
    };
    // SAFETY: the caller's promise; a size in u64 is in no live memory.
    let words = unsafe { std::slice::from_raw_parts((*arguments).cast::<u64>(), size / 8) };
    words.iter().map(|&word| live(word)).sum()
}

/// Bytes that candle's kernel moves; 0 if it is not known here.
///
/// # Safety
/// The arguments are those that the kernel takes.
pub unsafe fn of_candle(name: &str, arguments: *const *const c_void) -> u64 {
    let arguments = Arguments(arguments);
    let Some((family, element)) = name.rsplit_once('_') else { return 0 };
    let Some(size) = Element::named(element).map(Element::bytes) else { return 0 };
    // Where the tensors begin among the arguments, and how many there are; where the number of elements stands.
    let (first, tensors, count) = match family {
        "copy2d" => (0, 2, None),
        "fast_sum" | "fast_max" | "fast_sum_small" => (4, 2, None),
        "im2col" => (9, 2, None),
        "upowf" => (4, 2, Some(0)),
        "const_set" => (4, 1, Some(0)),
        _ if family.starts_with("where_") => (3, 4, Some(0)),
        _ if family.starts_with("is_") => (3, 3, Some(0)),
        _ if family.starts_with("ia_") => (2, 2, None),
        _ if family.starts_with('b') || family.len() == 2 => (3, 3, Some(0)),
        _ => (3, 2, Some(0)),
    };
    // SAFETY: the caller's promise.
    unsafe {
        let most = match (family, count) {
            ("copy2d", _) => {
                u64::from(arguments.at::<u32>(2)) * u64::from(arguments.at::<u32>(3)) * size
            }
            (_, Some(index)) => arguments.at::<u64>(index) * size.max(4),
            _ => u64::MAX,
        };
        (first..first + tensors).map(|index| live(arguments.at(index)).min(most)).sum()
    }
}
