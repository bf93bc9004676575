//! Operands of a product.

use super::super::panel::{Into, Left, Right};

/// `C [m, n] (+)= scale * A [m, k] B [k, n]`, rows of C `c_stride` apart; `k` counts pairs.
pub struct Operands<'a> {
    pub c_stride: usize,
    pub into: Into,
    pub scale: f32,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub a: Left<'a>,
    pub b: Right<'a>,
}
