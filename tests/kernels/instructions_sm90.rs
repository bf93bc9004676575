//! Hopper's instructions in the emulator, against their definitions in the PTX ISA.

use crate::common::{error, random, values};
use crate::device::{compiled, encode, Memory};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::tensor_map::{Element, Swizzle, TensorMap};
use candle_sam_lora_emulator::{Emulator, Launch, Mode};
use std::sync::OnceLock;

fn emulator() -> &'static Emulator {
    static EMULATOR: OnceLock<Emulator> = OnceLock::new();
    EMULATOR.get_or_init(|| {
        compiled(&["sm90/gemm_sm90.cu", "sm90/instructions_sm90.cu", "sm90/cluster_sm90.cu"])
    })
}

/// The shape of a launch.
#[derive(Clone, Copy)]
struct Blocks {
    grid: [u32; 3],
    threads: u32,
    shared_bytes: u32,
    cluster: u32,
}

const ONE: Blocks = Blocks { grid: [1; 3], threads: 32, shared_bytes: 0, cluster: 1 };

/// Launches in every mode of copies and products; `words` follow the tensor maps in the params.
fn run(
    kernel: &str,
    blocks: Blocks,
    maps: &[&TensorMap],
    words: &[u64],
    mut check: impl FnMut(Mode),
) {
    let Blocks { grid, threads, shared_bytes, cluster } = blocks;
    let mut params: Vec<u8> = maps.iter().flat_map(|map| encode(map).unwrap()).collect();
    params.extend(words.iter().flat_map(|word| word.to_ne_bytes()));
    if !maps.is_empty() {
        params.resize(params.len().next_multiple_of(64), 0);
    }
    for mode in Mode::all_with_products() {
        let (block, params) = ([threads, 1, 1], &params);
        let launch =
            Launch { kernel, grid, block, shared_bytes, cluster, params, begins_early: false };
        // SAFETY: the callers' memory is as long as the kernels say.
        unsafe { emulator().launch(&launch, mode) }.unwrap_or_else(|e| panic!("{mode:?}: {e}"));
        check(mode);
    }
}

/// One of the products of instructions_sm90.cu.
struct Product {
    dtype: DType,
    n: usize,
    swizzle: usize,
    trans_a: bool,
    trans_b: bool,
    registers: bool,
}

impl Product {
    fn name(&self) -> String {
        let element = if self.dtype == DType::F32 { "tf32" } else { self.dtype.as_str() };
        let mut name = format!("product_sm90_{element}_n{}_{}", self.n, self.swizzle);
        for (tail, is) in [("_ra", self.registers), ("_ta", self.trans_a), ("_tb", self.trans_b)] {
            name.push_str(if is { tail } else { "" });
        }
        name
    }

    fn check(&self) -> Result<()> {
        let size = self.dtype.size_in_bytes();
        let depth = 128 / size;
        let (a, b) = (random(1, (64, depth)), random(2, (self.n, depth)));
        let (a, b) = (a.to_dtype(self.dtype)?, b.to_dtype(self.dtype)?);
        let rounded = |t: &Tensor| -> Vec<f64> {
            let tf32 =
                |x: f64| f32::from_bits(((x as f32).to_bits() + 0x1000) & 0xFFFF_E000).into();
            let values = values(t);
            if size == 4 {
                values.into_iter().map(tf32).collect()
            } else {
                values
            }
        };
        let expected =
            candle_sam_lora::testing::reference::linear(&rounded(&a), &rounded(&b), depth);
        let map = |tensor: &Tensor, trans: bool| -> Result<(Memory, TensorMap)> {
            let tensor = if trans { tensor.t()?.contiguous()? } else { tensor.clone() };
            let (rows, cols) = tensor.dims2()?;
            let memory = Memory::from_tensor(&tensor);
            let element = if size == 4 { Element::Tf32 } else { Element::Bits16 };
            let shape = (rows as u32, cols as u32, cols as u32);
            let tile = (rows as u32, (self.swizzle / size) as u32);
            let map = TensorMap::matrix(memory.address(), element, shape, tile)?;
            Ok((memory, map))
        };
        let ((_a, a_map), (_b, b_map)) = (map(&a, self.trans_a)?, map(&b, self.trans_b)?);
        let out = Memory::for_elements(64 * self.n, DType::F32);
        let name = self.name();
        let blocks = Blocks { threads: 128, shared_bytes: 41088, ..ONE };
        run(&name, blocks, &[&a_map, &b_map], &[out.address()], |mode| {
            let error = error(&out.values(DType::F32), &expected);
            assert!(error < 1e-6, "{name} {mode:?}: {error:e}");
        });
        Ok(())
    }
}

#[test]
fn wgmma_of_every_type_layout_and_swizzle() -> Result<()> {
    let (bf16, f16, tf32) = (DType::BF16, DType::F16, DType::F32);
    for (dtype, n, swizzle, trans_a, trans_b, registers) in [
        (bf16, 8, 128, false, false, false),
        (f16, 192, 128, false, false, false),
        (bf16, 256, 64, false, false, false),
        (bf16, 24, 32, false, false, false),
        (bf16, 128, 128, false, true, false),
        (f16, 64, 64, true, false, false),
        (bf16, 80, 32, true, true, false),
        (bf16, 64, 128, false, false, true),
        (f16, 64, 128, false, true, true),
        (tf32, 96, 128, false, false, false),
        (tf32, 16, 128, false, false, true),
    ] {
        Product { dtype, n, swizzle, trans_a, trans_b, registers }.check()?;
    }
    Ok(())
}

#[test]
fn bulk_copies_fill_with_zeros_before_and_behind_a_tensor_and_leave_out_what_lies_there(
) -> Result<()> {
    const FROM: [usize; 4] = [3, 2, 3, 4]; // outermost first
    const TO: [usize; 3] = [2, 3, 4];
    let (input, bytes) = (random(1, &FROM), random(2, 128));
    let (from, plain) = (Memory::from_tensor(&input), Memory::from_tensor(&bytes));
    let out = Memory::for_elements(128, DType::F32);
    let to = Memory::for_elements(24, DType::F32);
    let map = |address, shape: &[usize], tile: &[u32]| {
        let dims: Vec<u32> = shape.iter().rev().map(|&n| n as u32).collect();
        let strides = (1..dims.len()).map(|d| 4 * dims[..d].iter().product::<u32>() as u64);
        let strides: Vec<_> = strides.collect();
        TensorMap::new((address, Element::Bits32), &dims, &strides, tile, Swizzle::None)
    };
    let from_map = map(from.address(), &FROM, &[4, 3, 2, 2])?;
    let to_map = map(to.address(), &TO, &[4, 3, 4])?;
    // The tile [2, 2, 3, 4] from (2, 0, 1, -1), as a tile [4, 3, 4] to (0, 1, 0).
    let input = values(&input);
    let tile = |i: usize, j: usize, k: usize, l: usize| {
        let inside = 2 + i < 3 && 1 + k < 3 && l > 0;
        if inside {
            input[(((2 + i) * 2 + j) * 3 + 1 + k) * 4 + l - 1]
        } else {
            0.0
        }
    };
    let mut words = vec![plain.address(), out.address()];
    words.resize(8, 0);
    let blocks = Blocks { threads: 64, shared_bytes: 1024, ..ONE };
    run("copies_sm90", blocks, &[&from_map, &to_map], &words, |mode| {
        assert_eq!(out.values(DType::F32), values(&bytes), "{mode:?}");
        let got = to.values(DType::F32);
        for (i, &got) in got.iter().enumerate().take(24) {
            let (outer, middle, inner) = (i / 12, i / 4 % 3, i % 4);
            if middle == 0 {
                assert!(got.is_nan(), "{mode:?}: wrote before the tile");
            } else {
                let expected = tile(outer / 2, outer % 2, middle - 1, inner);
                assert_eq!(got, expected, "{mode:?} {i}");
            }
        }
    });
    Ok(())
}

#[test]
fn stmatrix_and_its_transpose() -> Result<()> {
    let input = random(2, (2, 8, 8)).to_dtype(DType::F16)?;
    let (memory, output) = (Memory::from_tensor(&input), Memory::for_elements(256, DType::F16));
    let expected = [&values(&input)[..], &values(&input.t()?)].concat();
    let words = [memory.address(), output.address()];
    run("stmatrix_sm90", Blocks { shared_bytes: 768, ..ONE }, &[], &words, |mode| {
        assert_eq!(output.values(DType::F16), expected, "{mode:?}");
    });
    Ok(())
}

#[test]
fn tf32_is_the_nearest_of_ten_bits_or_the_even_one() -> Result<()> {
    let ulp = (2f32).powi(-10);
    let pairs = [
        (1.0, 1.0),
        (1.0 + 0.5 * ulp, 1.0),
        (1.0 + 0.5001 * ulp, 1.0 + ulp),
        (-1.0 - 1.5 * ulp, -1.0 - 2.0 * ulp),
        (f32::MAX, f32::INFINITY),
        (f32::NEG_INFINITY, f32::NEG_INFINITY),
        (0.0, 0.0),
        (f32::NAN, f32::NAN),
    ];
    let input: Vec<f32> = pairs.iter().map(|pair| pair.0).cycle().take(32).collect();
    let input = Tensor::from_vec(input, 32, &candle_core::Device::Cpu)?;
    let (memory, output) = (Memory::from_tensor(&input), Memory::for_elements(32, DType::F32));
    run("tf32_sm90", ONE, &[], &[memory.address(), output.address()], |mode| {
        for (got, (_, expected)) in output.values(DType::F32).into_iter().zip(pairs) {
            let expected = f64::from(expected);
            assert!(got == expected || got.is_nan() && expected.is_nan(), "{mode:?}: {got}");
        }
    });
    Ok(())
}

#[test]
fn products_behind_a_pipeline_of_bulk_copies() -> Result<()> {
    for dtype in [DType::F16, DType::BF16] {
        for (m, n, k) in [(64, 64, 64), (70, 129, 328), (1, 1, 8)] {
            let x = random(1, (m, k)).to_dtype(dtype)?;
            let w = random(2, (n, k)).to_dtype(dtype)?;
            let expected = candle_sam_lora::testing::reference::linear(&values(&x), &values(&w), k);
            let (x, w) = (Memory::from_tensor(&x), Memory::from_tensor(&w));
            let y = Memory::for_elements(m * n, DType::F32);
            let map = |memory: &Memory, rows: usize| {
                let shape = (rows as u32, k as u32, k as u32);
                TensorMap::matrix(memory.address(), Element::Bits16, shape, (64, 64))
            };
            let (x_map, w_map) = (map(&x, m)?, map(&w, n)?);
            let words = [y.address(), m as u64 | (n as u64) << 32, k as u64];
            let grid = [m.div_ceil(64) as u32, n.div_ceil(64) as u32, 1];
            let kernel = format!("gemm_sm90_{}", dtype.as_str());
            let blocks = Blocks { grid, threads: 256, shared_bytes: 50176, ..ONE };
            run(&kernel, blocks, &[&x_map, &w_map], &words, |mode| {
                let error = error(&y.values(DType::F32), &expected);
                assert!(error < 1e-6, "{m} {n} {k} {dtype:?} {mode:?}: {error:e}");
            });
        }
    }
    Ok(())
}

#[test]
fn blocks_of_a_cluster_load_for_each_other() -> Result<()> {
    let (clusters, steps) = (2, 5);
    let input = random(1, (clusters, steps, 16 * 32));
    let expected = values(&input.sum(1)?.repeat((1, 2))?); // both blocks of a cluster have the same
    let (memory, out) =
        (Memory::from_tensor(&input), Memory::for_elements(clusters * 2 * 16 * 32, DType::F32));
    let matrix = ((clusters * steps * 16) as u32, 32, 32);
    let map = TensorMap::unswizzled(memory.address(), Element::Bits32, matrix, (8, 32))?;
    let grid = [2 * clusters as u32, 1, 1];
    let blocks = Blocks { grid, threads: 64, shared_bytes: 5120, cluster: 2 };
    let words = [out.address(), steps as u64];
    run("cluster_sm90", blocks, &[&map], &words, |mode| {
        let error = error(&out.values(DType::F32), &expected);
        assert!(error < 1e-6, "{mode:?}: {error:e}");
    });
    Ok(())
}
