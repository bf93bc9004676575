//! The products without an instruction for them.

use super::super::panel::Into;
use super::operands::Operands;

/// The bytes of a quad.
fn bytes(quad: f32) -> [u8; 4] {
    quad.to_bits().to_le_bytes()
}

pub fn product((c, c_stride): (&mut [f32], usize), operands: &Operands<'_>) {
    let &Operands { into, shape: (m, n, k), a, b, b_stride, scales } = operands;
    let mut sums = vec![0i32; n];
    for i in 0..m {
        let (scale, correction) = operands.row(i);
        sums.fill(correction);
        for (p, &quad) in a[i * operands.a_stride()..][..k].iter().enumerate() {
            let x = bytes(quad).map(|byte| i32::from(byte.cast_signed()));
            for (sum, &quad) in sums.iter_mut().zip(&b[p * b_stride..]) {
                let w = bytes(quad).map(i32::from);
                *sum += x[0] * w[0] + x[1] * w[1] + x[2] * w[2] + x[3] * w[3];
            }
        }
        for ((c, &sum), &column) in c[i * c_stride..].iter_mut().zip(&sums).zip(scales) {
            let value = sum as f32 * scale * column;
            *c = if into.0 == Into::Add { *c + value } else { value };
        }
    }
}
