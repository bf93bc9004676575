//! A step of AdamW on one parameter, in one pass.
//!
//! ```text
//! m = m + (1 - beta1) (g - m)      v = beta2 v + (1 - beta2) g^2
//! p = decay p - rate m / (sqrt(v) root_correction + eps)
//! ```

use super::simd::run;
use crate::problem::{AdamWRates, AdamWStep};
use pulp::{Simd, WithSimd};
use rayon::prelude::*;

/// Elements of one task.
const CHUNK: usize = 1 << 14;

/// Changes the parameter and its moments, `[parameter, exp_avg, exp_avg_sq]`.
pub fn update(values: [&mut [f32]; 3], gradient: &[f32], step: &AdamWStep, rates: AdamWRates) {
    let [p, m, v] = values.map(|values| values.par_chunks_mut(CHUNK));
    p.zip(m.zip(v)).zip(gradient.par_chunks(CHUNK)).for_each(|((p, (m, v)), g)| {
        run(Update { values: [p, m, v], g, step, rates });
    });
}

struct Update<'a> {
    values: [&'a mut [f32]; 3],
    g: &'a [f32],
    step: &'a AdamWStep,
    rates: AdamWRates,
}

impl WithSimd for Update<'_> {
    type Output = ();

    /// A plain loop, which the compiler turns into vectors of the instruction set that `run` chose.
    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let AdamWStep { beta1_rest, beta2, beta2_rest, root_correction, eps, .. } = *self.step;
        let [beta1_rest, beta2, beta2_rest, root_correction, eps] =
            [beta1_rest, beta2, beta2_rest, root_correction, eps].map(|x| x as f32);
        let (decay, rate) = (self.rates.decay as f32, self.rates.rate as f32);
        let [p, m, v] = self.values;
        for (((p, m), v), &g) in p.iter_mut().zip(m).zip(v).zip(self.g) {
            *m += (g - *m) * beta1_rest;
            *v = *v * beta2 + g * g * beta2_rest;
            *p = *p * decay - *m / (v.sqrt() * root_correction + eps) * rate;
        }
    }
}
