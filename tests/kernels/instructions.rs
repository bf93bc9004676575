//! Single instructions in the emulator, against their definitions in the PTX ISA.

use crate::common::{error, random, values};
use crate::device::{compiled, Memory};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora_emulator::{Emulator, Launch, Mode};
use std::sync::OnceLock;

fn emulator() -> &'static Emulator {
    static EMULATOR: OnceLock<Emulator> = OnceLock::new();
    EMULATOR.get_or_init(|| compiled(&["gemm.cu", "instructions.cu"]))
}

/// Runs one of the kernels of instructions.cu in every mode, in blocks of 32 threads (`copies`: 64).
fn run(kernel: &str, blocks: usize, shared_bytes: u32, input: &Memory, output: &Memory) {
    let params = [input.address(), output.address()];
    for mode in Mode::all() {
        let grid = [blocks as u32, 1, 1];
        let params = bytemuck::bytes_of(&params);
        let block = [if kernel == "copies" { 64 } else { 32 }, 1, 1];
        let launch =
            Launch { kernel, grid, block, shared_bytes, cluster: 1, params, begins_early: false };
        // SAFETY: the callers' memory is as long as instructions.cu says.
        unsafe { emulator().launch(&launch, mode) }.unwrap_or_else(|e| panic!("{e}"));
    }
}

#[test]
fn conversions_round_as_the_half_crate_does() -> Result<()> {
    // Every exponent and sign with mantissas around ties, and some at random.
    let mut bits: Vec<u32> = Vec::new();
    for high in 0..=0x1FFu32 {
        for mantissa in [0, 1, 0xFFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x7FFF, 0x8000, 0x8001] {
            bits.extend([high << 23 | mantissa, high << 23 | (0x7F_FFFF - mantissa)]);
        }
    }
    let random = candle_sam_lora::philox::philox4x32;
    bits.extend((0..20_000).flat_map(|i| random([i, 0, 0, 0], [1, 2])));
    bits.resize(bits.len().next_multiple_of(32), 0);
    let input =
        Tensor::from_iter(bits.iter().map(|&b| f32::from_bits(b)), &candle_core::Device::Cpu)?;
    let output = Memory::for_elements(2 * bits.len(), DType::F32);
    run("convert", bits.len() / 32, 0, &Memory::from_tensor(&input), &output);
    for (bits, got) in bits.iter().zip(output.values(DType::F32).chunks(2)) {
        let x = f32::from_bits(*bits);
        for (got, expected) in
            got.iter().zip([half::f16::from_f32(x).to_f64(), half::bf16::from_f32(x).to_f64()])
        {
            let same = got.to_bits() == expected.to_bits();
            assert!(same || (got.is_nan() && expected.is_nan()), "{x:e}: {got:e}, {expected:e}");
        }
    }
    Ok(())
}

#[test]
fn tf32_products() -> Result<()> {
    let input = random(1, 128 + 64);
    let output = Memory::for_elements(128, DType::F32);
    run("tf32", 1, 0, &Memory::from_tensor(&input), &output);
    // Ten bits of mantissa, ties away from zero: add half of the last place that stays, cut the rest.
    let round = |x: f64| f32::from_bits(((x as f32).to_bits() + 0x1000) & 0xFFFF_E000) as f64;
    let input: Vec<f64> = values(&input).into_iter().map(round).collect();
    let (x, w) = input.split_at(128);
    let expected: Vec<f64> =
        (0..128).map(|i| (0..8).map(|k| x[i / 8 * 8 + k] * w[k * 8 + i % 8]).sum()).collect();
    assert!(error(&output.values(DType::F32), &expected) < 1e-6);
    Ok(())
}

#[test]
fn ldmatrix_and_its_transpose() -> Result<()> {
    let input = random(2, (2, 8, 8)).to_dtype(DType::F16)?;
    let output = Memory::for_elements(4 * 64, DType::F16);
    run("transpose", 1, 256, &Memory::from_tensor(&input), &output);
    let transposed = values(&input.t()?);
    let expected = [&values(&input)[..64], &transposed[..64], &transposed].concat();
    assert_eq!(output.values(DType::F16), expected);
    Ok(())
}

#[test]
fn copies_of_every_width_and_zeros_where_there_is_nothing_to_copy() -> Result<()> {
    let input = random(4, 96);
    let output = Memory::for_elements(96, DType::F32);
    run("copies", 1, 256, &Memory::from_tensor(&input), &output);
    let expected: Vec<f64> =
        values(&input).iter().enumerate().map(|(i, x)| if i % 3 != 2 { *x } else { 0.0 }).collect();
    assert_eq!(output.values(DType::F32)[..64], expected[..64]);
    assert!(error(&output.values(DType::F32), &expected) < 1e-6);
    Ok(())
}

#[test]
fn shuffles_and_reductions() -> Result<()> {
    let input = random(3, 32);
    let output = Memory::for_elements(7 * 32, DType::F32);
    run("shuffle", 1, 0, &Memory::from_tensor(&input), &output);
    let (x, out) = (values(&input), output.values(DType::F32));
    let max = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    assert!(error(&out[..32], &vec![x.iter().sum(); 32]) < 1e-6);
    assert_eq!(out[32..64], vec![max; 32]);
    for lane in 0..32 {
        assert_eq!(out[64 + lane], x[(lane + 5) % 32]);
        // Past the last lane it is the lane's own.
        assert_eq!(out[96 + lane], if lane + 3 < 32 { x[lane + 3] } else { x[lane] });
    }
    let powers: Vec<f64> = x.iter().map(|x| x.exp2()).collect();
    assert!(error(&out[128..160], &powers) < 1e-6);
    assert_eq!(out[160..], [[f64::from(u8::from(max > 1.0)); 32], [0.0; 32]].concat());
    Ok(())
}

/// The params struct of gemm.cu.
#[repr(C)]
#[derive(Clone, Copy, bytemuck::NoUninit)]
struct GemmParams {
    addresses: [u64; 3],
    sizes: [u32; 4],
}

#[test]
fn staged_products() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        for (m, n, k) in [(64, 64, 32), (70, 129, 104), (1, 1, 8)] {
            let x = random(1, (m, k)).to_dtype(dtype)?;
            let w = random(2, (n, k)).to_dtype(dtype)?;
            let expected = candle_sam_lora::testing::reference::linear(&values(&x), &values(&w), k);
            let (x, w) = (Memory::from_tensor(&x), Memory::from_tensor(&w));
            for mode in Mode::all() {
                let y = Memory::for_elements(m * n, DType::F32);
                let params = GemmParams {
                    addresses: [x.address(), w.address(), y.address()],
                    sizes: [m as u32, n as u32, k as u32, 0],
                };
                let grid = [m.div_ceil(64) as u32, n.div_ceil(64) as u32, 1];
                let kernel = format!("gemm_{}", dtype.as_str());
                let launch = Launch {
                    kernel: &kernel,
                    grid,
                    block: [128, 1, 1],
                    shared_bytes: 20480,
                    cluster: 1,
                    params: bytemuck::bytes_of(&params),
                    begins_early: false,
                };
                // SAFETY: the memory lives and is as long as the sizes say.
                unsafe { emulator().launch(&launch, mode) }.unwrap_or_else(|e| panic!("{e}"));
                let error = error(&y.values(DType::F32), &expected);
                assert!(error < 1e-6, "{m} {n} {k} {dtype:?} {mode:?}: {error:e}");
            }
        }
    }
    Ok(())
}

/// The largest errors, in units of 2^-23: of GELU by `max(1, |x|)`, of its derivative, and of GELU by itself where
/// `|x|` is at most 3.
#[test]
fn gelu_is_accurate_over_the_whole_range() -> Result<()> {
    use candle_sam_lora::testing::reference::gelu;
    let mut inputs: Vec<f32> = (-30_000..30_000).map(|i| i as f32 * 5e-4).collect();
    inputs.extend(
        (0..254u32).flat_map(|e| [f32::from_bits(e << 23 | 0x12_3456), -f32::from_bits(e << 23)]),
    );
    inputs.extend([f32::INFINITY, f32::NEG_INFINITY, f32::NAN, f32::MAX, f32::MIN]);
    inputs.resize(inputs.len().next_multiple_of(32), 0.0);
    let input = Tensor::new(inputs.as_slice(), &candle_core::Device::Cpu)?;
    let output = Memory::for_elements(2 * inputs.len(), DType::F32);
    run("gelus", inputs.len() / 32, 0, &Memory::from_tensor(&input), &output);
    let outputs = output.values(DType::F32);
    let (values, derivatives) = outputs.split_at(inputs.len());
    let ulp = f64::from(f32::EPSILON);
    let mut worst = [0f64; 3];
    for ((&x, &y), &dy) in inputs.iter().zip(values).zip(derivatives) {
        if !x.is_finite() {
            let limits = (f64::from(x).max(0.0), f64::from(u8::from(x > 0.0)));
            let right = if x.is_nan() { y.is_nan() && dy.is_nan() } else { (y, dy) == limits };
            assert!(right, "{x}: {y}, {dy}");
            continue;
        }
        let (x, exact) = (f64::from(x), gelu(x.into()));
        let pdf = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
        let slope = if x == 0.0 { 0.5 } else { exact / x + x * pdf };
        worst[0] = worst[0].max((y - exact).abs() / x.abs().max(1.0) / ulp);
        worst[1] = worst[1].max((dy - slope).abs() / ulp);
        if x.abs() <= 3.0 && exact.abs() > 1e-30 {
            worst[2] = worst[2].max((y / exact - 1.0).abs() / ulp);
        }
    }
    println!("GELU, its derivative, GELU relative to itself up to 3: {worst:.2?} ulp");
    assert!(worst[0] <= 1.0 && worst[1] <= 2.0 && worst[2] <= 40.0, "{worst:?} ulp");
    Ok(())
}
