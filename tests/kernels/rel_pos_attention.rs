//! The attention's kernels: every instance against the f64 reference, grids and windows of any size, padding, dropout.

use crate::attention_case::{forward_on, gradients_by, Case, Shapes, DROPOUT, GLOBAL, WINDOWED};
use crate::common::{error, values, Worst};
use crate::device::{
    bound, compile, emulator, in_every_mode, in_modes, kernels, launch_all, Device, Memory, DTYPES,
};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::rel_pos_attention::sm90::backward as attention_bwd_sm90;
use candle_sam_lora::launch::rel_pos_attention::sm90::windows as attention_window_sm90;
use candle_sam_lora::launch::rel_pos_attention::tiles;
use candle_sam_lora::launch::rel_pos_attention::{self as attention, BackwardOperands, Inputs};
use candle_sam_lora::launch::{AttentionProblem, Launch};
use candle_sam_lora::ops;
use candle_sam_lora::testing::composed;
use candle_sam_lora_emulator::{Emulator, Mode, Sources};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::OnceLock;

/// The smallest case of each kernel of a dtype, and cases that only some have to do.
fn shapes(dtype: DType) -> Vec<Shapes> {
    let mut all: Vec<Shapes> =
        [16, 32, 64, 80].map(|dim| Shapes { dim, ..GLOBAL }).into_iter().collect();
    all.extend([16, 64, 80].map(|dim| Shapes { dim, ..WINDOWED }));
    if dtype != DType::F32 {
        // The tile of 64 columns; more than one block of queries, and a last one with idle warps.
        all.extend([64, 80].map(|dim| Shapes { dim, grid: (2, 63), ..GLOBAL }));
        // The tile of 40, with an odd number of key rows.
        all.extend([64, 80].map(|dim| Shapes { dim, grid: (3, 39), ..GLOBAL }));
    }
    if dtype == DType::BF16 {
        all.extend([
            // SAM's window: two blocks of queries, tiles of four rows of which the last is half empty.
            Shapes { grid: (14, 17), window: Some(14), heads: 2, ..WINDOWED },
            // Several stripes, several blocks.
            Shapes { grid: (9, 41), ..GLOBAL },
            Shapes { grid: (2, 79), ..GLOBAL },
            Shapes { grid: (3, 65), dim: 32, ..GLOBAL },
            // More blocks of queries than parts of the tables' gradients.
            Shapes { grid: (24, 24), heads: 2, dim: 16, window: Some(2), ..GLOBAL },
        ]);
    }
    if dtype == DType::F16 {
        all.extend([
            // A slimmed head: no 16-byte vectors.
            Shapes { dim: 14, heads: 3, batch: 2, ..WINDOWED },
            Shapes { grid: (16, 16), dim: 32, ..GLOBAL },
            Shapes { grid: (1, 1), ..GLOBAL },
            Shapes { grid: (13, 1), ..GLOBAL },
            Shapes { pad: false, ..WINDOWED },
        ]);
    }
    if dtype == DType::F32 {
        all.extend([
            Shapes { rel_pos: false, dim: 16, ..WINDOWED },
            Shapes { dim: 5, heads: 2, dropout: Some(DROPOUT), ..WINDOWED },
            Shapes { grid: (4, 18), dim: 16, ..GLOBAL },
        ]);
    } else {
        all.push(Shapes { dropout: Some(DROPOUT), grid: (4, 61), ..GLOBAL });
        all.push(Shapes { dropout: Some(DROPOUT), heads: 2, batch: 2, ..WINDOWED });
    }
    all
}

/// The output against the f64 reference.
fn check_output(case: &Case, out: &Memory, worst: &mut Worst) -> Result<()> {
    let expected = case.reference();
    let eager = composed::rel_pos_attention(&case.qkv, &case.config(&case.tables, &case.pad))?;
    let eager = error(&values(&eager.0), &expected);
    let got = error(&out.values(case.dtype), &expected);
    assert!(got <= bound(case.dtype, eager), "{}: {got:e}, eager {eager:e}", case.name);
    worst.note(&format!("out {:?}", case.dtype), &case.name, got);
    Ok(())
}

/// Makes the launch of a forward for these inputs and outputs, if its kernels cover the case.
type Forward = dyn Fn(&Case, &Inputs, [u64; 2]) -> Result<Option<Launch>>;

/// Runs a forward for Hopper in these modes: the output against the f64 reference, and lse against the portable
/// kernel's.
pub fn check_hopper_forward(
    case: &Case,
    modes: impl Iterator<Item = Mode>,
    forward: &Forward,
    worst: &mut Worst,
    launched: &mut BTreeSet<String>,
) -> Result<()> {
    let on_device = case.memory();
    let names = RefCell::new(launched);
    let outputs = in_modes(&case.name, modes, |device| {
        let outputs = case.outputs();
        let launch = forward(case, &on_device.inputs(), outputs.each_ref().map(Memory::address))?;
        let launch = launch.unwrap_or_else(|| panic!("{}: not covered", case.name));
        launch_all(device, std::slice::from_ref(&launch))?;
        names.borrow_mut().insert(launch.kernel);
        Ok(outputs.into())
    });
    check_output(case, &outputs[0], worst)?;

    let mode = Mode::all().next().unwrap();
    let device = Device { emulator: emulator(), mode };
    let expected = forward_on(&device, case, &on_device)?[1].values(DType::F32);
    for (index, (got, expected)) in outputs[1].values(DType::F32).iter().zip(&expected).enumerate()
    {
        // Queries outside the grid have no lse.
        let same = (got - expected).abs() < 1e-4 || (got.is_nan() && expected.is_nan());
        assert!(same, "{}: lse {index} is {got}, expected {expected}", case.name);
    }
    Ok(())
}

/// All kernels of a pass, portable or Hopper's, must have been among those launched.
pub fn assert_all_ran(pass: &str, hopper: bool, launched: &BTreeSet<String>) -> Result<()> {
    let kernels = emulator().kernels().map_err(candle_core::Error::msg)?;
    let prefix = format!("rel_pos_attention_{pass}");
    let of_pass = |name: &String| name.starts_with(&prefix) && name.contains("_sm90_") == hopper;
    let kernels: BTreeSet<String> = kernels.into_iter().filter(of_pass).collect();
    let missing: Vec<&String> = kernels.difference(launched).collect();
    assert!(!kernels.is_empty() && missing.is_empty(), "no case runs {missing:?}");
    Ok(())
}

fn check_forward(case: &Case, worst: &mut Worst, launched: &mut BTreeSet<String>) -> Result<()> {
    let on_device = case.memory();
    let outputs = in_every_mode(&case.name, |device| forward_on(device, case, &on_device));
    let inputs = Inputs { qkv: 16, tables: [0; 2], pad: 0 };
    let launch = attention::forward_with(case.tile(), &case.problem, case.dtype, &inputs, [16; 2])?;
    launched.insert(launch.kernel);
    check_output(case, &outputs[0], worst)
}

#[test]
fn forward() -> Result<()> {
    let mut worst = Worst::default();
    let mut launched = BTreeSet::new();
    for dtype in DTYPES {
        for shapes in shapes(dtype) {
            check_forward(&Case::new(shapes, dtype)?, &mut worst, &mut launched)?;
        }
    }
    worst.check("rel_pos_attention forward", 1.0 / 64.0);
    assert_all_ran("fwd", false, &launched)
}

/// The kernels that a case is for.
#[derive(Clone, Copy, PartialEq, Eq)]
pub enum Kernels {
    Portable,
    Hopper,
    /// The same, but the key pass as nvcc before CUDA 13.1 compiles it.
    HopperKeysInSharedMemory,
    HopperWindows,
}

/// The key pass for Hopper with keys and values as left operands in shared memory.
fn keys_in_shared_memory() -> &'static Emulator {
    static EMULATOR: OnceLock<Emulator> = OnceLock::new();
    EMULATOR.get_or_init(|| {
        let file = kernels().join("rel_pos_attention/sm90/bwd_key.cu");
        let defines = vec!["KEYS_IN_REGISTERS=false".to_string()];
        compile(&Sources { defines, ..Sources::files(kernels(), vec![file]) })
    })
}

impl Kernels {
    pub fn backward(
        self,
        case: &Case,
        inputs: &Inputs,
        operands: &BackwardOperands,
    ) -> Result<Vec<Launch>> {
        let (p, dtype, gpu) = (&case.problem, case.dtype, &case.gpu());
        match self {
            Self::Portable => attention::backward(p, dtype, inputs, operands, gpu),
            Self::Hopper | Self::HopperKeysInSharedMemory => {
                Ok(attention_bwd_sm90::backward(p, dtype, inputs, operands, gpu)?
                    .unwrap_or_else(|| panic!("{}: not covered", case.name)))
            }
            Self::HopperWindows => {
                Ok(attention_window_sm90::backward(p, dtype, inputs, operands, gpu)?
                    .unwrap_or_else(|| panic!("{}: not covered", case.name)))
            }
        }
    }

    /// For gradients of the tables and the pad if they are `trained`.
    pub fn workspace_bytes(self, case: &Case, trained: [bool; 2]) -> Result<usize> {
        let (p, gpu) = (&case.problem, &case.gpu());
        match self {
            Self::HopperWindows => Ok(attention_window_sm90::workspace_bytes(p, trained, gpu)),
            _ => attention::workspace_bytes(p, case.dtype, trained, gpu),
        }
    }

    fn modes(self) -> Vec<Mode> {
        match self {
            Self::Portable | Self::HopperWindows => Mode::all().collect(),
            Self::Hopper | Self::HopperKeysInSharedMemory => Mode::all_with_products().collect(),
        }
    }
}

/// dqkv, and the gradients of the tables and of the pad where they are trained, the same in every mode.
fn run_backward(
    kernels: Kernels,
    case: &Case,
    dout: &Tensor,
    trained: bool,
    launched: &mut BTreeSet<String>,
) -> Result<Vec<Memory>> {
    let names = RefCell::new(launched);
    let trained = [trained && case.shapes.rel_pos, trained && case.shapes.pad];
    let device = Device { emulator: emulator(), mode: Mode::all().next().unwrap() };
    let on_device = case.memory();
    let forward = forward_on(&device, case, &on_device)?;
    Ok(in_modes(&case.name, kernels.modes().into_iter(), |device| {
        let backward = case.backward(dout, trained, kernels.workspace_bytes(case, trained)?);
        let operands = backward.operands(&forward);
        let launches = kernels.backward(case, &on_device.inputs(), &operands)?;
        names.borrow_mut().extend(launches.iter().map(|launch| launch.kernel.clone()));
        for launch in &launches {
            let is_key_pass = launch.kernel.contains("bwd_key");
            let emulator = match kernels {
                Kernels::HopperKeysInSharedMemory if is_key_pass => keys_in_shared_memory(),
                _ => device.emulator,
            };
            launch_all(&Device { emulator, ..*device }, std::slice::from_ref(launch))?;
        }
        Ok(backward.gradients.into())
    }))
}

/// The gradients against the composed graph's in f32; with `frozen`, dqkv has the same bits where nothing else is
/// wanted.
pub fn check_backward(
    kernels: Kernels,
    case: &Case,
    frozen: bool,
    worst: &mut Worst,
    launched: &mut BTreeSet<String>,
) -> Result<()> {
    let (dtype, dout) = (case.dtype, case.dout(9)?);
    let outputs = run_backward(kernels, case, &dout, true, launched)?;
    if frozen {
        let frozen = run_backward(kernels, case, &dout, false, launched)?;
        assert!(frozen[0].bytes() == outputs[0].bytes(), "{}: frozen", case.name);
    }

    let (_, expected) = gradients_by(case, DType::F32, &dout, ops::rel_pos_attention)?;
    let (_, eager) = gradients_by(case, dtype, &dout, |qkv, config| {
        Ok(composed::rel_pos_attention(qkv, config)?.0)
    })?;
    for (index, what) in ["dqkv", "dtables", "dpad"].into_iter().enumerate() {
        if expected[index].is_empty() {
            continue;
        }
        if case.problem.tokens() == 1 && what == "dtables" {
            // One weight is always 1: no gradient but rounding.
            let got = outputs[index].values(dtype);
            assert!(got.iter().all(|x| x.abs() < 1e-4), "{}", case.name);
            continue;
        }
        let got = error(&outputs[index].values(dtype), &expected[index]);
        let eager = error(&eager[index], &expected[index]);
        assert!(got <= bound(dtype, eager), "{what} {}: {got:e}, eager {eager:e}", case.name);
        worst.note(&format!("{what} {dtype:?}"), &case.name, got);
    }
    Ok(())
}

#[test]
fn backward() -> Result<()> {
    let mut worst = Worst::default();
    let mut launched = BTreeSet::new();
    for dtype in DTYPES {
        for (index, shapes) in shapes(dtype).into_iter().enumerate() {
            let frozen = index == 0 || shapes.pad;
            let case = Case::new(shapes, dtype)?;
            check_backward(Kernels::Portable, &case, frozen, &mut worst, &mut launched)?;
        }
    }
    worst.check("rel_pos_attention backward", 1.0 / 16.0);
    assert_all_ran("bwd", false, &launched)
}

/// Tuning may give a problem any of a family's tiles, also such as waste most of their columns on it.
#[test]
fn any_tile_serves_any_problem() -> Result<()> {
    let (mut worst, mut launched) = (Worst::default(), BTreeSet::new());
    for shapes in [Shapes { grid: (3, 20), ..GLOBAL }, Shapes { dim: 80, ..WINDOWED }] {
        let case = Case::new(shapes, DType::BF16)?;
        for tile in tiles::candidates(&case.problem, case.dtype) {
            let case = Case { cols: Some(tile.cols), ..Case::new(shapes, DType::BF16)? };
            check_forward(&case, &mut worst, &mut launched)?;
            check_backward(Kernels::Portable, &case, false, &mut worst, &mut launched)?;
            for pass in ["fwd", "bwd_query"] {
                let kernel = tile.instance(&format!("rel_pos_attention_{pass}")) + "_bf16";
                assert!(launched.contains(&kernel), "{kernel} was not run");
            }
        }
    }
    worst.check("rel_pos_attention, any tile", 1.0 / 32.0);
    Ok(())
}

/// One window of nine tokens, three of them padding: what the kernels' threads share, and little else, for
/// ThreadSanitizer.
#[test]
fn smallest_case() -> Result<()> {
    let mut worst = Worst::default();
    let shapes = Shapes { grid: (2, 3), window: Some(3), dim: 16, ..WINDOWED };
    let case = Case::new(shapes, DType::F16)?;
    check_forward(&case, &mut worst, &mut BTreeSet::new())?;
    check_backward(Kernels::Portable, &case, true, &mut worst, &mut BTreeSet::new())?;
    worst.check("rel_pos_attention, smallest", 1.0 / 64.0);
    Ok(())
}

/// Attention over one head's grid where every key takes `rel_h` of the row that `row_of` its own row says.
fn with_key_rows(case: &Case, row_of: impl Fn(usize) -> usize) -> Vec<f64> {
    let AttentionProblem { h, w, head_dim: d, softmax_scale, .. } = case.problem;
    let (qkv, tables) = (values(&case.qkv), [0, 1].map(|which| values(&case.tables[which])));
    let vector = |part: usize, token: usize| &qkv[(token * 3 + part) * d..][..d];
    let dot = |a: &[f64], b: &[f64]| -> f64 { a.iter().zip(b).map(|(a, b)| a * b).sum() };
    let mut out = vec![0.0; h * w * d];
    for (query, out) in out.chunks_mut(d).enumerate() {
        let q = vector(0, query);
        let score = |key: usize| {
            let (row_h, row_w) = (query / w + h - 1 - row_of(key / w), query % w + w - 1 - key % w);
            f64::from(softmax_scale) * dot(q, vector(1, key))
                + dot(q, &tables[0][row_h * d..][..d])
                + dot(q, &tables[1][row_w * d..][..d])
        };
        let weights: Vec<f64> = (0..h * w).map(|key| score(key).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for (key, weight) in weights.iter().enumerate() {
            out.iter_mut().zip(vector(2, key)).for_each(|(o, v)| *o += weight / sum * v);
        }
    }
    out
}

/// A tile of several key rows whose `rel_h` is looked up by the tile's number is wrong, silently, unless a tile is one
/// key row. Ours are right on data that tells, for every tile.
#[test]
fn rel_h_is_that_of_the_key_row_whatever_the_tile() -> Result<()> {
    let mut tiles = BTreeSet::new();
    for dtype in DTYPES {
        for grid in [(16, 16), (6, 40), (4, 64)] {
            let case = Case::new(Shapes { grid, ..GLOBAL }, dtype)?;
            let tile = case.tile();
            tiles.insert((tile.cols, tile.rows));
            let expected = case.reference();
            assert!(error(&with_key_rows(&case, |row| row), &expected) < 1e-12);
            let rows = tile.rows.max(2);
            let wrong = error(&with_key_rows(&case, |row| row / rows), &expected);
            assert!(wrong > 0.3, "{}: the data would not tell: {wrong:e}", case.name);

            let device = Device {
                emulator: emulator(),
                mode: Mode { seed: 1, ..Mode::all().last().unwrap() },
            };
            let got = forward_on(&device, &case, &case.memory())?[0].values(dtype);
            let got = error(&got, &expected);
            println!(
                "{grid:?} {dtype:?}, tile {} x {}: {got:9.2e}, by tile {wrong:9.2e}",
                tile.rows, tile.cols
            );
            let bound =
                [1e-5, 1.0 / 512.0, 1.0 / 64.0][DTYPES.iter().position(|d| *d == dtype).unwrap()];
            assert!(got <= bound, "{}: {got:e}", case.name);
        }
    }
    assert_eq!(tiles, BTreeSet::from([(16, 2), (16, 4), (40, 2), (64, 1)]));
    Ok(())
}
