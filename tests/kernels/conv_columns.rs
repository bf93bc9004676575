//! A convolution's columns and their gradient against loops in f64.

use crate::common::{error, random, values};
use crate::device::{in_every_mode, launch_plan, Memory, DTYPES};
use candle_core::{DType, Result};
use candle_sam_lora::launch::conv_columns::{plan, Pass};
use candle_sam_lora::launch::slots::Operands;
use candle_sam_lora::launch::ConvColumns;

const SMALLEST: ConvColumns =
    ConvColumns { batch: 1, h: 1, w: 1, channels: 1, kernel: 3, stride: 1 };
const CASES: [ConvColumns; 5] = [
    SMALLEST,
    ConvColumns { batch: 2, h: 5, w: 7, channels: 3, ..SMALLEST },
    ConvColumns { h: 9, w: 4, channels: 16, ..SMALLEST },
    ConvColumns { batch: 3, h: 6, w: 5, channels: 8, stride: 2, ..SMALLEST },
    ConvColumns { h: 8, w: 7, channels: 12, kernel: 5, stride: 3, ..SMALLEST },
];

/// Calls `visit` with the places of every element of the columns, in its order: there, and in x unless it is outside.
fn each(problem: &ConvColumns, mut visit: impl FnMut(usize, Option<usize>)) {
    let &ConvColumns { batch, h, w, channels, kernel, stride } = problem;
    let mut column = 0;
    for (image, row) in (0..batch).flat_map(|b| (0..problem.rows()).map(move |r| (b, r))) {
        for (col, tap) in
            (0..problem.cols()).flat_map(|c| (0..kernel * kernel).map(move |t| (c, t)))
        {
            let inside = |position: usize, length| {
                position.checked_sub(kernel / 2).filter(|position| *position < length)
            };
            let y = inside(row * stride + tap / kernel, h);
            let x = inside(col * stride + tap % kernel, w);
            let position = y.zip(x).map(|(y, x)| (image * h + y) * w + x);
            for channel in 0..channels {
                visit(column, position.map(|position| position * channels + channel));
                column += 1;
            }
        }
    }
}

#[test]
fn columns_and_their_gradient() -> Result<()> {
    for (problem, dtype) in CASES.into_iter().flat_map(|case| DTYPES.map(|dtype| (case, dtype))) {
        let ConvColumns { batch, h, w, channels, .. } = problem;
        let x = random(1, batch * h * w * channels).to_dtype(dtype)?;
        let count = batch * problem.rows() * problem.cols() * problem.width();
        let grad = random(2, count).to_dtype(dtype)?;
        let case = format!("{problem:?} {dtype:?}");
        let outputs = in_every_mode(&case, |device| {
            let run = |pass, from: &candle_core::Tensor, count| -> Result<Memory> {
                let (from, to) = (Memory::from_tensor(from), Memory::for_elements(count, dtype));
                let (inputs, outputs) = (&[from.address()], &[to.address()]);
                let operands = Operands { inputs, outputs, ..Default::default() };
                launch_plan(device, &plan(&problem, pass, dtype)?, &operands)?;
                Ok(to)
            };
            let columns = run(Pass::Forward, &x, count)?;
            Ok(vec![columns, run(Pass::Backward, &grad, x.elem_count())?])
        });
        let (of_x, of_grad) = (values(&x), values(&grad));
        let (mut columns, mut dx) = (vec![0.0; count], vec![0.0; of_x.len()]);
        each(&problem, |column, position| {
            if let Some(position) = position {
                columns[column] = of_x[position];
                dx[position] += of_grad[column];
            }
        });
        assert!(outputs[0].values(dtype) == columns, "{case}");
        let bound = match dtype {
            DType::F32 => 1e-6,
            DType::F16 => 1.0 / 1024.0,
            _ => 1.0 / 128.0,
        };
        let error = error(&outputs[1].values(dtype), &dx);
        assert!(error <= bound, "{case}: {error:e}");
    }
    Ok(())
}
