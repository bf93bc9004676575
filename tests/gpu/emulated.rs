//! The GPU against the emulator, which runs the same kernels from their sources on the same inputs. The machine needs
//! the sources and a C++ compiler. Emulated are the portable kernels; a GPU with others is held against them with both.
//!
//! The two differ where the emulator does not know the hardware's last bits. These are the order and rounding of the
//! sums inside the tensor cores, and the approximations of 2^x, division and square root.

#[path = "../kernels/attention_case.rs"]
mod attention_case;
#[path = "../kernels/device.rs"]
mod device;
#[path = "../kernels/projection_case.rs"]
mod projection_case;

use crate::common::{error, random, values};
use crate::{trial, with_each};
use attention_case::{forward_on, Shapes, GLOBAL};
use candle_core::{DType, Device, Result, Tensor};
use candle_sam_lora::launch::projection::{self, Activation};
use candle_sam_lora::launch::slots::Operands;
use candle_sam_lora::launch::{layer_norm, Gpu, LayerNormProblem};
use candle_sam_lora::ops;
use device::{in_every_mode, launch_all, launch_plan, Memory, DTYPES};
use libtest_mimic::Trial;
use projection_case::{Data, PLAIN};
use std::path::Path;

pub fn trials() -> Vec<Trial> {
    type Test = fn(DType, &Device) -> Result<()>;
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").is_dir();
    let tests: [(&str, Test); 6] = [
        ("layer_norm", layer_norm_of),
        ("attention global", |dtype, device| attention_of((20, 20), None, dtype, device)),
        ("attention window", |dtype, device| attention_of((6, 9), Some(5), dtype, device)),
        ("lora_linear", lora_linear_of),
        ("lora_qkv", |dtype, device| lora_qkv_of(0.25, dtype, device)),
        ("lora_qkv without dropout", |dtype, device| lora_qkv_of(0.0, dtype, device)),
    ];
    let mut trials = Vec::new();
    for (name, test) in tests {
        for dtype in DTYPES {
            let name = format!("emulator {name} {}", dtype.as_str());
            trials.push(trial(name, move |d| test(dtype, d)).with_ignored_flag(!here));
        }
    }
    trials
}

/// Bounds relative to the largest value, in f32, f16 and bf16.
type Bounds = [f64; 3];

/// f32: sums of a row in the same order. Else a step between neighbouring numbers: results that agree to f32 may lie on
/// either side of a middle when they are rounded.
const ELEMENTWISE: Bounds = [1e-6, 1.0 / 1024.0, 1.0 / 128.0];
/// f32: what each is allowed to be off the truth, in sums of another order. Else two steps. Operands that are rounded
/// on the way, the attention's weights and LoRA's `A x`, may differ by a step too. In a sum with all others that is
/// less than a step of the result.
const PRODUCTS: Bounds = [1e-5, 2.0 / 1024.0, 2.0 / 128.0];

fn compare(what: &str, dtype: DType, gpu: &Tensor, emulated: &Memory, bounds: Bounds) {
    let error = error(&values(gpu), &emulated.values(dtype));
    println!("{what} {dtype:?}: GPU and emulator differ by {error:.1e}");
    let [f32, f16, bf16] = bounds;
    let bound = match dtype {
        DType::F32 => f32,
        DType::F16 => f16,
        _ => bf16,
    };
    assert!(error <= bound, "{what} {dtype:?}: GPU and emulator differ by {error:e} > {bound:e}");
}

fn tensor(seed: u64, shape: &[usize], scale: f64, dtype: DType) -> Result<Tensor> {
    (random(seed, shape) * scale)?.to_dtype(dtype)
}

fn layer_norm_of(dtype: DType, device: &Device) -> Result<()> {
    let (rows, size, eps) = (37, 768, 1e-6);
    let x = tensor(1, &[rows, size], 1.0, dtype)?;
    let (weight, bias) = (tensor(2, &[size], 1.0, dtype)?, tensor(3, &[size], 1.0, dtype)?);
    let [from_x, from_weight, from_bias] = [&x, &weight, &bias].map(Memory::from_tensor);
    let problem = LayerNormProblem { rows, size, eps };
    let outputs = in_every_mode("layer_norm", |device| {
        let y = Memory::for_elements(rows * size, dtype);
        let inputs = &[&from_x, &from_weight, &from_bias].map(Memory::address);
        let plan = layer_norm::plan(&problem, layer_norm::Pass::Forward, dtype)?;
        let operands = Operands { inputs, outputs: &[y.address()], ..Default::default() };
        launch_plan(device, &plan, &operands)?;
        Ok(vec![y])
    });
    let on = |t: &Tensor| t.to_device(device);
    with_each(device, || {
        let y = ops::layer_norm(&on(&x)?, &on(&weight)?, &on(&bias)?, eps)?;
        compare("layer_norm", dtype, &y, &outputs[0], ELEMENTWISE);
        Ok(())
    })
}

/// Two heads of 64; windows hang over the grid.
fn attention_of(
    grid: (usize, usize),
    window: Option<usize>,
    dtype: DType,
    device: &Device,
) -> Result<()> {
    let shapes = Shapes { grid, heads: 2, window, pad: window.is_some(), ..GLOBAL };
    let (case, on) = (attention_case::Case::new(shapes, dtype)?, |t: &Tensor| t.to_device(device));
    let on_device = case.memory();
    let outputs = in_every_mode("attention", |device| forward_on(device, &case, &on_device));
    let (tables, pad) = ([on(&case.tables[0])?, on(&case.tables[1])?], on(&case.pad)?);
    with_each(device, || {
        let out = ops::rel_pos_attention(&on(&case.qkv)?, &case.config(&tables, &pad))?;
        compare("attention", dtype, &out, &outputs[0], PRODUCTS);
        Ok(())
    })
}

/// Adapters are of the dtype of the rest.
fn projections_of(
    what: &str,
    case: projection_case::Case,
    dtype: DType,
    device: &Device,
) -> Result<()> {
    let data = Data::new(case, dtype)?.map(&|t| t.to_dtype(dtype))?;
    let (problem, on_device) = (data.projections(), data.memory()?);
    let outputs = in_every_mode(what, |device| {
        let outputs = data.outputs();
        let operands = on_device.forward(&outputs);
        launch_all(device, &projection::forward(&problem, dtype, &operands, &Gpu::A100)?)?;
        Ok(outputs.into())
    });
    let on_gpu = data.map(&|t| t.to_device(device))?;
    with_each(device, || {
        compare(what, dtype, &on_gpu.output()?, &outputs[0], PRODUCTS);
        Ok(())
    })
}

const LORA: projection_case::Case =
    projection_case::Case { in_dim: 96, ranks: &[16], bias: true, ..PLAIN };

/// With GELU, dropout and a residual.
fn lora_linear_of(dtype: DType, device: &Device) -> Result<()> {
    let case =
        projection_case::Case { p: 0.25, activation: Activation::Gelu, residual: true, ..LORA };
    projections_of("lora_linear", case, dtype, device)
}

fn lora_qkv_of(p: f64, dtype: DType, device: &Device) -> Result<()> {
    let case = projection_case::Case { outs: &[64; 3], ranks: &[16; 3], p, ..LORA };
    projections_of("lora_qkv", case, dtype, device)
}
