//! Vectors in a row, bit for bit.

use crate::common::{random, values};
use crate::device::{in_every_mode, launch_plan, Memory, DTYPES};
use candle_core::{Result, Tensor};
use candle_sam_lora::launch::concat::plan;
use candle_sam_lora::launch::slots::Operands;

#[test]
fn vectors_lie_one_behind_the_other() -> Result<()> {
    let cases: [&[usize]; 4] = [&[1], &[768; 3], &[255, 1, 257], &[3, 500, 1, 2, 64, 7, 1, 9]];
    for (lengths, dtype) in cases.into_iter().flat_map(|case| DTYPES.map(|dtype| (case, dtype))) {
        let vectors = lengths.iter().zip(1..);
        let vectors = vectors.map(|(&length, seed)| random(seed, length).to_dtype(dtype));
        let vectors = vectors.collect::<Result<Vec<_>>>()?;
        let expected = Tensor::cat(&vectors, 0)?;
        let memories: Vec<_> = vectors.iter().map(Memory::from_tensor).collect();
        let inputs: Vec<_> = memories.iter().map(Memory::address).collect();
        let plan = plan(lengths, dtype)?;
        let outputs = in_every_mode(&format!("{lengths:?} {dtype:?}"), |device| {
            let out = Memory::for_elements(expected.elem_count(), dtype);
            let operands =
                Operands { inputs: &inputs, outputs: &[out.address()], ..Default::default() };
            launch_plan(device, &plan, &operands)?;
            Ok(vec![out])
        });
        assert_eq!(outputs[0].values(dtype), values(&expected), "{lengths:?} {dtype:?}");
    }
    Ok(())
}
