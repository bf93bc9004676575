//! Dropout masks on the device have the bits of those on the CPU.

use crate::common::{random, values};
use crate::device::{in_every_mode, launch_plan, Memory, DTYPES};
use candle_core::Result;
use candle_sam_lora::launch::dropout;
use candle_sam_lora::launch::slots::Operands;
use candle_sam_lora::philox::Dropout;

#[test]
fn the_mask_is_that_of_the_cpu() -> Result<()> {
    let masks = [
        Dropout { p: 0.1, seed: 7, stream: 3 },
        Dropout { p: 0.5, seed: u64::MAX - 5, stream: u32::MAX },
        Dropout { p: 0.0, seed: 1, stream: 0 },
    ];
    for dtype in DTYPES {
        for (rows, cols) in [(1, 1), (3, 8), (5, 37), (70, 129)] {
            for mask in masks {
                let x = random(5, (rows, cols)).to_dtype(dtype)?;
                let input = Memory::from_tensor(&x);
                let case = format!("{rows} x {cols} {dtype:?} {mask:?}");
                let outputs = in_every_mode(&case, |device| {
                    let y = Memory::for_elements(rows * cols, dtype);
                    let operands = Operands {
                        inputs: &[input.address()],
                        outputs: &[y.address()],
                        dropouts: &[Some(mask)],
                        ..Default::default()
                    };
                    launch_plan(device, &dropout::plan((rows, cols), dtype)?, &operands)?;
                    // The mask of another seed, which lies in memory.
                    let replayed = Memory::for_elements(rows * cols, dtype);
                    let seed = Memory::from_bytes_at(&mask.seed.to_le_bytes(), 0);
                    let operands = Operands {
                        outputs: &[replayed.address()],
                        dropouts: &[Some(Dropout { seed: 99, ..mask })],
                        replayed: Some((99, seed.address())),
                        ..operands
                    };
                    launch_plan(device, &dropout::plan((rows, cols), dtype)?, &operands)?;
                    assert!(replayed.bytes() == y.bytes(), "{case}: of a seed in memory");
                    Ok(vec![y])
                });
                let factors = mask.mask(rows, cols);
                let expected = values(&x).into_iter().zip(&factors).map(|(x, m)| x as f32 * m);
                let expected = candle_core::Tensor::from_iter(expected, x.device())?;
                assert_eq!(outputs[0].values(dtype), values(&expected.to_dtype(dtype)?), "{case}");
            }
        }
    }
    Ok(())
}
