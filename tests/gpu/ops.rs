//! Every operation on the GPU: values, gradients, strides, repetition, streams.

use crate::common::cases::{all, assert_any_strides, large, Op};
use crate::common::{error, gradients, nudged, random, tensor_error, values, TIMES_ROUNDING};
use crate::watchdog::unwatched;
use crate::{trial, with_each};
use candle_core::{CudaDevice, DType, Device, Result, Tensor};
use candle_sam_lora::cuda::{self, Kernels};
use libtest_mimic::Trial;

const DTYPES: [DType; 3] = [DType::F32, DType::F16, DType::BF16];
/// Relative, of f32 results and gradients.
const F32_BOUND: f64 = 1e-5;

fn cases() -> Vec<Op<'static>> {
    all().into_iter().chain(large()).collect()
}

/// One trial for each case, dtype and property. Cases are made again in the trial: their closures stay in one thread.
pub fn trials() -> Vec<Trial> {
    type Test = fn(&Op, DType, &Device) -> Result<()>;
    let properties: [(&str, Test); 5] = [
        ("values", values_agree_with_the_reference),
        ("gradients", gradients_agree_with_the_composed_graph),
        ("strides", any_strides_give_the_same_bits),
        ("repeat", ten_runs_give_the_same_bits),
        ("streams", two_streams_give_the_same_bits),
    ];
    let mut trials = Vec::new();
    for (index, op) in cases().into_iter().enumerate() {
        for dtype in DTYPES {
            for (property, test) in properties {
                let name = format!("{property} {} {}", op.name, dtype.as_str());
                trials.push(trial(name, move |device| match cases().get(index) {
                    Some(op) => test(op, dtype, device),
                    None => candle_core::bail!("there is no case {index}"),
                }));
            }
        }
    }
    trials
}

/// The inputs rounded to `dtype`, on the CPU and on the device.
fn inputs(op: &Op, dtype: DType, device: &Device) -> Result<(Vec<Tensor>, Vec<Tensor>)> {
    let host: Vec<_> = op.inputs.iter().map(|t| t.to_dtype(dtype)).collect::<Result<_>>()?;
    let device = host.iter().map(|t| t.to_device(device)).collect::<Result<_>>()?;
    Ok((host, device))
}

fn one_rounding(dtype: DType) -> f64 {
    match dtype {
        DType::F16 => 1.0 / 2048.0,
        DType::BF16 => 1.0 / 256.0,
        _ => F32_BOUND,
    }
}

fn check(what: &str, op: &Op, dtype: DType, got: f64, bound: f64) {
    assert!(got <= bound, "{} {dtype:?} {what}: error {got:e}, bound {bound:e}", op.name);
}

fn values_agree_with_the_reference(op: &Op, dtype: DType, device: &Device) -> Result<()> {
    let (host, inputs) = inputs(op, dtype, device)?;
    let (expected, eager) = unwatched(|| -> Result<_> {
        let expected = (op.reference)(&host.iter().map(values).collect::<Vec<_>>());
        let eager = error(&values(&(op.composed)(&host)?), &expected);
        Ok((expected, eager))
    })?;
    let bound = match dtype {
        DType::F32 => F32_BOUND,
        _ => one_rounding(dtype).max(2.0 * eager),
    };
    with_each(device, || {
        let out = (op.fused)(&inputs)?;
        assert_eq!(out.dtype(), dtype);
        assert!(out.device().same_device(device));
        check("value", op, dtype, error(&values(&out), &expected), bound);
        Ok(())
    })
}

fn gradients_agree_with_the_composed_graph(op: &Op, dtype: DType, device: &Device) -> Result<()> {
    let (host, inputs) = inputs(op, dtype, device)?;
    let grad_out = random(79, (op.fused)(&inputs)?.shape()).to_dtype(dtype)?;
    let wide: Vec<_> = host.iter().map(|t| t.to_dtype(DType::F32)).collect::<Result<_>>()?;
    let wide_grad_out = grad_out.to_dtype(DType::F32)?;
    let (_, truth) = unwatched(|| gradients(&wide, &wide_grad_out, &op.composed))?;
    let on_device = grad_out.to_device(device)?;
    let bounds: Vec<f64> = match dtype {
        // As far as the truth is one: f32, too, magnifies roundings where GELU is steep and its argument a large sum.
        DType::F32 => {
            let nudged = unwatched(|| gradients(&nudged(&host), &grad_out, &op.composed));
            let (_, rounded) = nudged?;
            let off = rounded.iter().zip(&truth).map(|(r, truth)| tensor_error(r, truth));
            off.map(|off| F32_BOUND.max(TIMES_ROUNDING * off)).collect()
        }
        // The forward's rounded output enters the attention's backward: one more rounding.
        _ => {
            let (_, eager) = gradients(&inputs, &on_device, &op.composed)?;
            let off = eager.iter().zip(&truth).map(|(e, truth)| tensor_error(e, truth));
            off.map(|off| (2.0 * one_rounding(dtype)).max(2.0 * off)).collect()
        }
    };
    with_each(device, || {
        let (_, grads) = gradients(&inputs, &on_device, &op.fused)?;
        for (index, ((grad, bound), truth)) in grads.iter().zip(&bounds).zip(&truth).enumerate() {
            assert_eq!(grad.dtype(), dtype);
            let got = tensor_error(grad, truth);
            check(&format!("gradient {index}"), op, dtype, got, *bound);
        }
        Ok(())
    })
}

/// The bits of output and gradients.
fn everything(op: &Op, inputs: &[Tensor]) -> Result<Vec<Vec<f64>>> {
    let shape = (op.fused)(inputs)?.shape().clone();
    let grad_out = random(80, shape).to_dtype(inputs[0].dtype())?.to_device(inputs[0].device())?;
    let (out, grads) = gradients(inputs, &grad_out, &op.fused)?;
    Ok(std::iter::once(&out).chain(&grads).map(values).collect())
}

fn any_strides_give_the_same_bits(op: &Op, dtype: DType, device: &Device) -> Result<()> {
    let (_, inputs) = inputs(op, dtype, device)?;
    with_each(device, || assert_any_strides(op, &inputs))
}

fn ten_runs_give_the_same_bits(op: &Op, dtype: DType, device: &Device) -> Result<()> {
    let (_, inputs) = inputs(op, dtype, device)?;
    with_each(device, || {
        let expected = everything(op, &inputs)?;
        for run in 1..10 {
            assert!(everything(op, &inputs)? == expected, "{}: run {run} gave other bits", op.name);
        }
        if cuda::kernels() == Kernels::Native {
            cuda::set_kernels(Kernels::NativeInTurn);
            let in_turn = everything(op, &inputs)?;
            cuda::set_kernels(Kernels::Native);
            assert!(in_turn == expected, "{}: kernels in turn give other bits", op.name);
        }
        Ok(())
    })
}

/// Two devices of candle's are two streams of one GPU: their kernels interleave.
fn two_streams_give_the_same_bits(op: &Op, dtype: DType, device: &Device) -> Result<()> {
    let (_, first) = inputs(op, dtype, device)?;
    with_each(device, || {
        let expected = values(&(op.fused)(&first)?);
        let streams = [0, 1].map(|_| CudaDevice::new_with_stream(0).map(Device::Cuda));
        let [one, two] = streams;
        let [one, two] = [one?, two?];
        let ((_, on_one), (_, on_two)) = (inputs(op, dtype, &one)?, inputs(op, dtype, &two)?);
        let mut outputs = Vec::new();
        for _ in 0..4 {
            outputs.push((op.fused)(&on_one)?);
            outputs.push((op.fused)(&on_two)?);
        }
        for out in &outputs {
            assert!(values(out) == expected, "{}: another stream gave other bits", op.name);
        }
        Ok(())
    })
}
