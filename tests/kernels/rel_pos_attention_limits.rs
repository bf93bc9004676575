//! The attention's kernels at their limits, against PyTorch in f32: a saturated softmax, and values that are not
//! finite.

use crate::attention_case::{forward_on, Case, Shapes, GLOBAL};
use crate::common::limits::{self, NotFinite, Rule, Saturated};
use crate::device::{emulator, launch_all, Device};
use crate::rel_pos_attention::Kernels;
use candle_core::{DType, Result, Tensor};
use candle_sam_lora_emulator::Mode;

/// As the kernels' tests have a case.
fn case(
    name: &str,
    inputs: &limits::Inputs,
    settings: &limits::Settings,
    dtype: DType,
) -> Result<Case> {
    let (batch, h, w, packed) = inputs.qkv.dims4()?;
    let &limits::Settings { num_heads: heads, softmax_scale, window } = settings;
    let (grid, dim, pad) = ((h, w), packed / 3 / heads, inputs.pad.is_some());
    let shapes = Shapes { batch, grid, heads, dim, window, pad, ..GLOBAL };
    let no_pad = || Tensor::zeros(packed, DType::F32, inputs.qkv.device());
    let [h, w] = inputs.tables.each_ref().map(|table| table.to_dtype(dtype));
    let pad = inputs.pad.clone().map_or_else(no_pad, Ok)?.to_dtype(dtype)?;
    let mut case = Case::of(shapes, inputs.qkv.to_dtype(dtype)?, [h?, w?], pad);
    case.name = format!("{name} {dtype:?}");
    case.problem.softmax_scale = softmax_scale as f32;
    Ok(case)
}

/// Output and gradients by name.
fn run(kernels: Kernels, case: &Case, grad_out: &Tensor) -> Result<Vec<(&'static str, Vec<f64>)>> {
    let dtype = case.dtype;
    let device = Device { emulator: emulator(), mode: Mode::all().next().unwrap() };
    let on_device = case.memory();
    let forward = forward_on(&device, case, &on_device)?;
    let trained = [true, case.shapes.pad];
    let bytes = kernels.workspace_bytes(case, trained)?;
    let backward = case.backward(&grad_out.to_dtype(dtype)?, trained, bytes);
    let operands = backward.operands(&forward);
    launch_all(&device, &kernels.backward(case, &on_device.inputs(), &operands)?)?;
    let [dqkv, dtables, dpad] = &backward.gradients;
    let mut h = dtables.values(dtype);
    let w = h.split_off(case.tables[0].elem_count());
    let mut all = vec![
        ("out", forward[0].values(dtype)),
        ("grad_qkv", dqkv.values(dtype)),
        ("grad_rel_pos_h", h),
        ("grad_rel_pos_w", w),
    ];
    if case.shapes.pad {
        all.push(("grad_pad", dpad.values(dtype)));
    }
    Ok(all)
}

/// f32 gradients at any size of the logits are within four times PyTorch's error, or what 3xTF32 leaves out of a
/// product.
#[test]
fn saturated_f32_gradients_are_as_exact_as_pytorch() -> Result<()> {
    let mut failures = Vec::new();
    for limit in Saturated::all()? {
        let case = case(&limit.name, &limit.inputs, &limit.settings, DType::F32)?;
        println!("{:<28} {:<15} {:>9} {:>9} {:>9}", case.name, "", "largest", "PyTorch", "here");
        for (name, got) in run(Kernels::Portable, &case, &limit.inputs.grad_out)? {
            let row = limit.compare(name, &got);
            println!("{:<28} {row}", "");
            failures.extend(row.failed(4.0).then(|| format!("{} {row}", case.name)));
        }
    }
    assert!(failures.is_empty(), "more than four times PyTorch's error:\n{}", failures.join("\n"));
    Ok(())
}

/// In f32 an infinity in q, k, v or their gradients is NaN in all its products: 3xTF32 has no low part of it.
const F32_INFINITIES: [&str; 11] = [
    "q_inf",
    "k_inf",
    "k_inf_channels",
    "v_inf",
    "v_infs",
    "v_inf_masked",
    "grad_inf",
    "overflow",
    "one_key",
    "window_v_inf",
    "window_pad_inf",
];

fn check_not_finite(dtype: DType, bound: f64, rule: Rule) -> Result<()> {
    let mut failures = Vec::new();
    for limit in NotFinite::all()? {
        // A table of another length is resized before a kernel sees it.
        if limit.name == "table_resized"
            || dtype == DType::F32 && F32_INFINITIES.contains(&&*limit.name)
        {
            continue;
        }
        let case = case(&limit.name, &limit.inputs, &limit.settings, dtype)?;
        for (name, got) in run(Kernels::Portable, &case, &limit.inputs.grad_out)? {
            if let Some(difference) = limit.difference(name, &got, bound, rule) {
                failures.push(format!("{}: {name}: {difference}", case.name));
            }
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
    Ok(())
}

#[test]
fn f32_not_finite_spreads_as_in_pytorch() -> Result<()> {
    check_not_finite(DType::F32, 1e-5, Rule::Exact)
}

#[test]
fn bf16_not_finite_spreads_as_in_pytorch() -> Result<()> {
    check_not_finite(DType::BF16, 0.05, Rule::Finite)
}

/// A mask in one channel of one row of a table, under queries that are positive. Queries that read the row get NaN in
/// that channel, and nothing else does. Hopper's kernels beside the portable ones, which PyTorch's fixtures hold.
#[test]
fn hopper_masks_in_tables_touch_their_readers_alone() -> Result<()> {
    let whole = Shapes { grid: (5, 64), ..GLOBAL };
    let windows = Shapes { grid: (16, 18), window: Some(14), pad: true, ..whole };
    for (kernels, shapes) in [
        (Kernels::Hopper, whole),
        (Kernels::Hopper, Shapes { grid: (7, 33), dim: 80, ..whole }),
        (Kernels::Hopper, Shapes { grid: (17, 9), heads: 2, ..whole }),
        (Kernels::HopperWindows, windows),
        (Kernels::HopperWindows, Shapes { dim: 80, heads: 2, ..windows }),
    ] {
        for (table, row) in [(0, 2), (1, 3)] {
            let mut case = Case::new(shapes, DType::BF16)?;
            case.name = format!("{} table {table}", case.name);
            case.qkv = case.qkv.abs()?;
            case.pad = case.pad.abs()?;
            let mut values = case.tables[table].to_dtype(DType::F32)?.to_vec2::<f32>()?;
            values[row][5] = f32::NEG_INFINITY;
            case.tables[table] = Tensor::new(values, case.qkv.device())?.to_dtype(DType::BF16)?;
            let grad_out = case.dout(9)?;
            let expected = run(Kernels::Portable, &case, &grad_out)?;
            let got = run(kernels, &case, &grad_out)?;
            let infinite = expected[1].1.iter().filter(|x| !x.is_finite()).count();
            assert!(
                infinite > 0 && infinite < shapes.grid.0 * shapes.grid.1 * shapes.heads,
                "{}: {infinite}",
                case.name
            );
            for ((name, expected), (_, got)) in expected.iter().zip(&got) {
                let finite = expected.iter().filter(|x| x.is_finite());
                let largest = finite.fold(0f64, |largest, x| largest.max(x.abs()));
                for (index, (got, expected)) in got.iter().zip(expected).enumerate() {
                    let same = match expected.is_finite() {
                        true => (got - expected).abs() <= 0.03 * largest,
                        false => !got.is_finite(),
                    };
                    assert!(same, "{}: {name} {index}: {got}, not {expected}", case.name);
                }
            }
        }
    }
    Ok(())
}
