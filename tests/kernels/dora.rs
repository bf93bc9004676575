//! DoRA's norm against f64.

use crate::common::{error, random, values, Worst};
use crate::device::{in_every_mode, launch_plan, Memory, DTYPES};
use candle_core::{DType, Result};
use candle_sam_lora::launch::dora::{self, DoraNorm};
use candle_sam_lora::launch::slots::Operands;

const SMALLEST: DoraNorm = DoraNorm { out_dim: 1, in_dim: 1, rank: 1, scaling: 0.7 };
const CASES: [DoraNorm; 6] = [
    SMALLEST,
    DoraNorm { out_dim: 9, in_dim: 33, rank: 3, ..SMALLEST },
    DoraNorm { out_dim: 16, in_dim: 200, rank: 16, ..SMALLEST },
    DoraNorm { out_dim: 13, in_dim: 130, rank: 17, ..SMALLEST },
    DoraNorm { out_dim: 8, in_dim: 64, rank: 64, ..SMALLEST },
    DoraNorm { out_dim: 5, in_dim: 40, rank: 256, ..SMALLEST },
];

#[test]
fn norm() -> Result<()> {
    let mut worst = Worst::default();
    for dtype in DTYPES {
        for problem in CASES {
            let DoraNorm { out_dim, in_dim, rank, .. } = problem;
            let name = format!("[{out_dim}, {in_dim}] rank {rank} {dtype:?}");
            let weight = random(1, (out_dim, in_dim)).to_dtype(dtype)?;
            let (a, b) = (random(2, (rank, in_dim)), random(3, (out_dim, rank)));
            let memories = [&weight, &a, &b].map(Memory::from_tensor);
            let inputs = memories.each_ref().map(Memory::address);
            let outputs = in_every_mode(&name, |device| {
                let norm = Memory::for_elements(out_dim, DType::F32);
                let outputs = &[norm.address()];
                let operands = Operands { inputs: &inputs, outputs, ..Default::default() };
                launch_plan(device, &dora::plan(&problem, dtype)?, &operands)?;
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
