//! The GPU against the emulator, which runs the same kernels from their sources on the same inputs: on machines that
//! have these and a C++ compiler. Emulated are the portable kernels; a GPU with others is held against them with both.
//!
//! The two differ where the emulator does not know the hardware's last bits: the order and rounding of the sums inside
//! the tensor cores, the approximations of 2^x, division and square root.

#[path = "../kernels/device.rs"]
mod device;

use crate::common::cases::DROPOUT;
use crate::common::{error, random, values};
use crate::{trial, with_each};
use candle_core::{DType, Device, Result, Tensor};
use candle_sam_lora::launch::projection::{
    self, ForwardOperands, LoraProblem, ProjectionProblem, Small,
};
use candle_sam_lora::launch::rel_pos_attention::{self as attention, Inputs};
use candle_sam_lora::launch::slots::Operands;
use candle_sam_lora::launch::{layer_norm, AttentionProblem, Gpu, LayerNormProblem};
use candle_sam_lora::ops::{self, Activation, Lora, Projection, RelPosAttention};
use candle_sam_lora::philox::Dropout;
use device::{in_every_mode, launch_all, launch_plan, Memory, DTYPES};
use libtest_mimic::Trial;
use std::path::Path;

pub fn trials() -> Vec<Trial> {
    type Test = fn(DType, &Device) -> Result<()>;
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).join("kernels").is_dir();
    let tests: [(&str, Test); 5] = [
        ("layer_norm", layer_norm_of),
        ("attention global", |dtype, device| attention_of((20, 20), None, dtype, device)),
        ("attention window", |dtype, device| attention_of((6, 9), Some(5), dtype, device)),
        ("lora_linear", lora_linear_of),
        ("lora_qkv", lora_qkv_of),
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
/// f32: what each is allowed to be off the truth, in sums of another order. Else two steps: operands that are rounded
/// on the way, the attention's weights and LoRA's `A x`, may differ by a step too, which in a sum with all others is
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
    (h, w): (usize, usize),
    window: Option<usize>,
    dtype: DType,
    device: &Device,
) -> Result<()> {
    let (num_heads, head_dim, softmax_scale) = (2, 64, 0.125);
    let (side_h, side_w) = window.map_or((h, w), |side| (side, side));
    let packed = 3 * num_heads * head_dim;
    let qkv = tensor(1, &[1, h, w, packed], 1.0, dtype)?;
    let table_h = tensor(2, &[2 * side_h - 1, head_dim], 0.3, dtype)?;
    let table_w = tensor(3, &[2 * side_w - 1, head_dim], 0.3, dtype)?;
    let pad = window.map(|_| tensor(4, &[packed], 1.0, dtype)).transpose()?;

    let problem = AttentionProblem {
        batch: 1,
        h,
        w,
        num_heads,
        head_dim,
        side_h,
        side_w,
        softmax_scale,
        rel_pos: true,
        dropout: None,
    };
    let (from_qkv, from_pad) = (Memory::from_tensor(&qkv), pad.as_ref().map(Memory::from_tensor));
    let from_tables = [&table_h, &table_w].map(Memory::from_tensor);
    let inputs = Inputs {
        qkv: from_qkv.address(),
        tables: from_tables.each_ref().map(Memory::address),
        pad: from_pad.as_ref().map_or(0, Memory::address),
    };
    let outputs = in_every_mode("attention", |device| {
        let out = Memory::for_elements(h * w * packed / 3, dtype);
        let lse = Memory::for_elements(attention::lse_elements(&problem, dtype), DType::F32);
        let launch = attention::forward(&problem, dtype, &inputs, out.address(), lse.address())?;
        launch_all(device, &[launch])?;
        Ok(vec![out, lse])
    });

    let on = |t: &Tensor| t.to_device(device);
    let (table_h, table_w, pad) = (on(&table_h)?, on(&table_w)?, pad.as_ref().map(on).transpose()?);
    let config = RelPosAttention {
        num_heads,
        softmax_scale: softmax_scale.into(),
        rel_pos: Some((&table_h, &table_w)),
        window,
        pad: pad.as_ref(),
        dropout: None,
    };
    with_each(device, || {
        let out = ops::rel_pos_attention(&on(&qkv)?, &config)?;
        compare("attention", dtype, &out, &outputs[0], PRODUCTS);
        Ok(())
    })
}

/// A projection's tensors: weight, bias, A, B.
struct Part {
    tensors: [Tensor; 4],
    dropout: Option<Dropout>,
}

const ROWS: usize = 70;
const IN_DIM: usize = 96;
const RANK: usize = 16;
const SCALING: f32 = 0.5;

impl Part {
    fn new(seed: u64, out_dim: usize, dropout: Option<Dropout>, dtype: DType) -> Result<Self> {
        let scale = (IN_DIM as f64).powf(-0.5);
        let tensors = [
            tensor(seed, &[out_dim, IN_DIM], scale, dtype)?,
            tensor(seed + 1, &[out_dim], 1.0, dtype)?,
            tensor(seed + 2, &[RANK, IN_DIM], scale, dtype)?,
            tensor(seed + 3, &[out_dim, RANK], (RANK as f64).powf(-0.5), dtype)?,
        ];
        Ok(Self { tensors, dropout })
    }

    fn out_dim(&self) -> Result<usize> {
        self.tensors[0].dim(0)
    }

    fn on(&self, device: &Device) -> Result<Self> {
        let [weight, bias, a, b] = self.tensors.each_ref().map(|t| t.to_device(device));
        Ok(Self { tensors: [weight?, bias?, a?, b?], dropout: self.dropout })
    }

    fn projection(&self) -> Projection<'_> {
        let [weight, bias, a, b] = &self.tensors;
        let (scaling, dropout) = (SCALING.into(), self.dropout);
        let lora = Lora { a, b, b_bias: None, scaling, dropout };
        Projection { weight, bias: Some(bias), lora: Some(lora) }
    }
}

/// Projections in the emulator.
fn emulate(
    parts: &[Part],
    x: &Tensor,
    activation: projection::Activation,
    residual: Option<&Tensor>,
) -> Result<Memory> {
    let dtype = x.dtype();
    let (mut problems, mut small) = (Vec::new(), Vec::new());
    for part in parts {
        let (rank, scaling, dropout) = (RANK, SCALING, part.dropout);
        let lora = Some(LoraProblem { rank, scaling, dropout, bias: false });
        problems.push(ProjectionProblem { out_dim: part.out_dim()?, bias: true, lora });
        for tensor in &part.tensors[1..] {
            small.push(tensor.flatten_all()?.to_dtype(DType::F32)?);
        }
    }
    let problem =
        projection::Problem { rows: ROWS, in_dim: IN_DIM, projections: &problems, activation };
    let count = ROWS * problems.iter().map(|p| p.out_dim).sum::<usize>();
    let weights: Vec<_> = parts.iter().map(|p| Memory::from_tensor(&p.tensors[0])).collect();
    let weights_at: Vec<_> = weights.iter().map(Memory::address).collect();
    let (from_x, small) = (Memory::from_tensor(x), Memory::from_tensor(&Tensor::cat(&small, 0)?));
    let residual = residual.map(Memory::from_tensor);
    let mut outputs = in_every_mode("projections", |device| {
        let (out, sum) = (Memory::for_elements(count, dtype), Memory::for_elements(count, dtype));
        let s = Memory::for_elements(projection::low_rank_len(&problem), DType::F32);
        let operands = ForwardOperands {
            x: from_x.address(),
            weights: &weights_at,
            small: Small::Flat(small.address()),
            residual: residual.as_ref().map_or(0, Memory::address),
            out: out.address(),
            low_rank: s.address(),
            sum: sum.address(),
        };
        launch_all(device, &projection::forward(&problem, dtype, &operands, &Gpu::A100)?)?;
        Ok(vec![out])
    });
    Ok(outputs.remove(0))
}

/// With GELU, dropout and a residual.
fn lora_linear_of(dtype: DType, device: &Device) -> Result<()> {
    let part = Part::new(10, 72, Some(DROPOUT), dtype)?;
    let x = tensor(1, &[ROWS, IN_DIM], 1.0, dtype)?;
    let residual = tensor(2, &[ROWS, part.out_dim()?], 1.0, dtype)?;
    let gelu = projection::Activation::Gelu;
    let emulated = emulate(std::slice::from_ref(&part), &x, gelu, Some(&residual))?;
    let (part, x, residual) = (part.on(device)?, x.to_device(device)?, residual.to_device(device)?);
    with_each(device, || {
        let y = ops::lora_linear(&x, &part.projection(), Activation::Gelu, Some(&residual))?;
        compare("lora_linear", dtype, &y, &emulated, PRODUCTS);
        Ok(())
    })
}

fn lora_qkv_of(dtype: DType, device: &Device) -> Result<()> {
    let part = |index: u32| {
        let dropout = (index != 1).then_some(Dropout { stream: index, ..DROPOUT });
        Part::new(10 * u64::from(index + 1), 64, dropout, dtype)
    };
    let parts = [part(0)?, part(1)?, part(2)?];
    let x = tensor(1, &[ROWS, IN_DIM], 1.0, dtype)?;
    let emulated = emulate(&parts, &x, projection::Activation::Identity, None)?;
    let [q, k, v] = parts.each_ref().map(|part| part.on(device));
    let [q, k, v] = [q?, k?, v?];
    let projections = [q.projection(), k.projection(), v.projection()];
    with_each(device, || {
        let y = ops::lora_qkv(&x.to_device(device)?, &projections)?;
        compare("lora_qkv", dtype, &y, &emulated, PRODUCTS);
        Ok(())
    })
}
