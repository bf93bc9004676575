//! DoRA's norm against f64.

use crate::common::{error, random, values, Worst};
use crate::device::{in_every_mode, launch_all, Memory, DTYPES};
use candle_core::{DType, Result};
use candle_sam_lora::launch::dora::{self, DoraNorm};

/// Rows, columns, rank.
const CASES: [(usize, usize, usize); 6] =
    [(1, 1, 1), (9, 33, 3), (16, 200, 16), (13, 130, 17), (8, 64, 64), (5, 40, 256)];

#[test]
fn norm() -> Result<()> {
    let mut worst = Worst::default();
    for dtype in DTYPES {
        for (out_dim, in_dim, rank) in CASES {
            let name = format!("[{out_dim}, {in_dim}] rank {rank} {dtype:?}");
            let problem = DoraNorm { out_dim, in_dim, rank, scaling: 0.7 };
            let weight = random(1, (out_dim, in_dim)).to_dtype(dtype)?;
            let (a, b) = (random(2, (rank, in_dim)), random(3, (out_dim, rank)));
            let memories = [&weight, &a, &b].map(Memory::from_tensor);
            let [weight_at, a_at, b_at] = memories.each_ref().map(Memory::address);
            let outputs = in_every_mode(&name, |device| {
                let norm = Memory::for_elements(out_dim, DType::F32);
                let launch = dora::norm(&problem, dtype, weight_at, a_at, b_at, norm.address())?;
                launch_all(device, &[launch])?;
                Ok(vec![norm])
            });
            let (weight, a, b) = (values(&weight), values(&a), values(&b));
            let expected: Vec<f64> = (0..out_dim)
                .map(|o| {
                    let square = |i: usize| {
                        let delta: f64 =
                            (0..rank).map(|r| b[o * rank + r] * a[r * in_dim + i]).sum();
                        (weight[o * in_dim + i] + f64::from(problem.scaling) * delta).powi(2)
                    };
                    (0..in_dim).map(square).sum::<f64>().sqrt()
                })
                .collect();
            worst.note(
                &format!("norm {dtype:?}"),
                &name,
                error(&outputs[0].values(DType::F32), &expected),
            );
        }
    }
    worst.check("dora norm", 1e-5);
    Ok(())
}
