//! Small sums and checks.

/// The dot product, summed in eight lanes.
#[inline]
pub fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut lanes = [0f32; 8];
    let (a_chunks, b_chunks) = (a.chunks_exact(8), b.chunks_exact(8));
    let tail: f32 = a_chunks.remainder().iter().zip(b_chunks.remainder()).map(|(x, y)| x * y).sum();
    for (x, y) in a_chunks.zip(b_chunks) {
        for (lane, (x, y)) in lanes.iter_mut().zip(x.iter().zip(y)) {
            *lane += x * y;
        }
    }
    lanes.iter().sum::<f32>() + tail
}

/// `sum += part`
pub fn add(sum: &mut [f32], part: &[f32]) {
    for (sum, part) in sum.iter_mut().zip(part) {
        *sum += part;
    }
}

/// `sum += factor * part`
pub fn add_scaled(sum: &mut [f32], factor: f32, part: &[f32]) {
    for (sum, part) in sum.iter_mut().zip(part) {
        *sum += factor * part;
    }
}

/// Whether nothing is infinite or NaN.
pub fn all_finite(values: &[f32]) -> bool {
    // The largest pattern without its sign: a maximum of integers is computed in vectors.
    let largest = values.iter().fold(0, |largest, x| largest.max(x.to_bits() & !(1 << 31)));
    largest < f32::INFINITY.to_bits()
}
