//! The attention's kernels: every instance against the f64 reference, grids and windows of any size, padding, dropout.

use crate::common::{error, gradients, random, values, Worst};
use crate::device::{
    bound, cache, emulator, in_every_mode, in_modes, kernels, launch_all, Device, Memory, DTYPES,
};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::rel_pos_attention::sm90::backward as attention_bwd_sm90;
use candle_sam_lora::launch::rel_pos_attention::sm90::windows as attention_window_sm90;
use candle_sam_lora::launch::rel_pos_attention::tiles::{self, Tile};
use candle_sam_lora::launch::rel_pos_attention::{self as attention, BackwardOperands, Inputs};
use candle_sam_lora::launch::tiles::Forced;
use candle_sam_lora::launch::{AttentionProblem, Gpu, Launch};
use candle_sam_lora::ops::{self, RelPosAttention};
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::testing::{composed, reference};
use candle_sam_lora_emulator::{Emulator, Mode, Sources};
use std::cell::RefCell;
use std::collections::BTreeSet;
use std::sync::OnceLock;

pub const DROPOUT: Dropout = Dropout { p: 0.2, seed: 77, stream: 5 };

/// A case's shapes; `pad` is whether tokens outside the grid have a vector of their own.
#[derive(Clone, Copy, Debug)]
pub struct Shapes {
    pub batch: usize,
    pub grid: (usize, usize),
    pub heads: usize,
    pub dim: usize,
    pub window: Option<usize>,
    pub rel_pos: bool,
    pub pad: bool,
    pub dropout: Option<Dropout>,
}

pub const GLOBAL: Shapes = Shapes {
    batch: 1,
    grid: (5, 7),
    heads: 1,
    dim: 64,
    window: None,
    rel_pos: true,
    pad: false,
    dropout: None,
};
pub const WINDOWED: Shapes = Shapes { grid: (6, 9), window: Some(5), pad: true, ..GLOBAL };

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

/// A case's tensors, in its dtype.
pub struct Case {
    pub name: String,
    pub shapes: Shapes,
    pub problem: AttentionProblem,
    pub dtype: DType,
    /// Columns of the tiles that are forced.
    pub cols: Option<usize>,
    pub qkv: Tensor,
    /// rel_pos_h and rel_pos_w.
    pub tables: [Tensor; 2],
    pub pad: Tensor,
}

impl Case {
    pub fn new(shapes: Shapes, dtype: DType) -> Result<Self> {
        let Shapes { batch, grid: (h, w), heads, dim, window, rel_pos, dropout, .. } = shapes;
        let (side_h, side_w) = window.map_or((h, w), |side| (side, side));
        let tensor = |seed, shape: &[usize]| random(seed, shape).to_dtype(dtype);
        Ok(Self {
            name: format!("{shapes:?} {dtype:?}"),
            shapes,
            problem: AttentionProblem {
                batch,
                h,
                w,
                num_heads: heads,
                head_dim: dim,
                side_h,
                side_w,
                softmax_scale: (dim as f32).powf(-0.5),
                rel_pos,
                dropout,
            },
            dtype,
            cols: None,
            qkv: tensor(1, &[batch, h, w, 3 * heads * dim])?,
            tables: [
                (tensor(2, &[2 * side_h - 1, dim])? * 0.3)?,
                (tensor(3, &[2 * side_w - 1, dim])? * 0.3)?,
            ],
            pad: if shapes.pad {
                tensor(4, &[3 * heads * dim])?
            } else {
                Tensor::zeros(3 * heads * dim, dtype, &candle_core::Device::Cpu)?
            },
        })
    }

    /// The portable kernels' tile.
    pub fn tile(&self) -> &'static Tile {
        tiles::pick(&self.problem, self.dtype, self.cols).expect("a tile")
    }

    /// A GPU whose kernels take the tiles that are forced.
    pub fn gpu(&self) -> Gpu {
        Gpu { forced: Forced { attention_cols: self.cols, ..Forced::NONE }, ..Gpu::H100 }
    }

    /// As the operations take it, for these tensors.
    pub fn config<'a>(&self, tables: &'a [Tensor], pad: &'a Tensor) -> RelPosAttention<'a> {
        RelPosAttention {
            num_heads: self.shapes.heads,
            softmax_scale: self.problem.softmax_scale.into(),
            rel_pos: self.shapes.rel_pos.then(|| (&tables[0], &tables[1])),
            window: self.shapes.window,
            pad: Some(pad),
            dropout: self.shapes.dropout,
        }
    }

    pub fn reference(&self) -> Vec<f64> {
        let p = &self.problem;
        let tokens = p.tokens();
        let mask = p.dropout.map(|d| d.mask(p.windows() * p.num_heads * tokens, tokens));
        let tables = [values(&self.tables[0]), values(&self.tables[1])];
        reference::Attention {
            batch: p.batch,
            grid: (p.h, p.w),
            num_heads: p.num_heads,
            head_dim: p.head_dim,
            window: self.shapes.window,
            softmax_scale: p.softmax_scale.into(),
        }
        .forward(
            &values(&self.qkv),
            p.rel_pos.then(|| (&tables[0][..], &tables[1][..])),
            &values(&self.pad),
            &|window, head, query, key| {
                let row = (window * p.num_heads + head) * tokens + query;
                mask.as_ref().map_or(1.0, |m| m[row * tokens + key].into())
            },
        )
    }

    pub fn memory(&self) -> Result<OnDevice> {
        Ok(OnDevice {
            qkv: Memory::from_tensor(&self.qkv),
            tables: self.tables.each_ref().map(Memory::from_tensor),
            pad: Memory::from_tensor(&self.pad),
            rel_pos: self.shapes.rel_pos,
            has_pad: self.shapes.pad,
        })
    }
}

/// A case's inputs.
pub struct OnDevice {
    qkv: Memory,
    tables: [Memory; 2],
    pad: Memory,
    rel_pos: bool,
    has_pad: bool,
}

impl OnDevice {
    pub fn inputs(&self) -> Inputs {
        let present = |memory: &Memory, is| if is { memory.address() } else { 0 };
        Inputs {
            qkv: self.qkv.address(),
            tables: self.tables.each_ref().map(|table| present(table, self.rel_pos)),
            pad: present(&self.pad, self.has_pad),
        }
    }
}

/// The output against the f64 reference, and lse against the portable kernel's.
pub fn check_outputs(case: &Case, outputs: &[Memory], worst: &mut Worst) -> Result<()> {
    let expected = case.reference();
    let eager = composed::rel_pos_attention(&case.qkv, &case.config(&case.tables, &case.pad))?;
    let eager = error(&values(&eager.0), &expected);
    let got = error(&outputs[0].values(case.dtype), &expected);
    assert!(got <= bound(case.dtype, eager), "{}: {got:e}, eager {eager:e}", case.name);
    worst.note(&format!("out {:?}", case.dtype), &case.name, got);

    let mode = Mode::all().next().unwrap();
    let device = Device { emulator: emulator(), mode };
    let expected = forward_on(&device, case, &case.memory()?)?[1].values(DType::F32);
    for (index, (got, expected)) in outputs[1].values(DType::F32).iter().zip(&expected).enumerate()
    {
        // Queries outside the grid have no lse.
        let same = (got - expected).abs() < 1e-4 || (got.is_nan() && expected.is_nan());
        assert!(same, "{}: lse {index} is {got}, expected {expected}", case.name);
    }
    Ok(())
}

/// Output and lse.
pub fn forward_on(device: &Device, case: &Case, on_device: &OnDevice) -> Result<Vec<Memory>> {
    let out = Memory::for_elements(case.qkv.elem_count() / 3, case.dtype);
    let lse = Memory::for_elements(attention::lse_elements(&case.problem, case.dtype), DType::F32);
    let (inputs, outputs) = (on_device.inputs(), [out.address(), lse.address()]);
    let launch = attention::forward_with(case.tile(), &case.problem, case.dtype, &inputs, outputs)?;
    launch_all(device, &[launch])?;
    Ok(vec![out, lse])
}

/// Output and lse, the same in every mode.
fn run_forward(case: &Case, on_device: &OnDevice) -> Vec<Memory> {
    in_every_mode(&case.name, |device| forward_on(device, case, on_device))
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

/// The output against the reference.
fn check_forward(case: &Case, worst: &mut Worst, launched: &mut BTreeSet<String>) -> Result<()> {
    let dtype = case.dtype;
    let outputs = run_forward(case, &case.memory()?);
    let inputs = Inputs { qkv: 16, tables: [0; 2], pad: 0 };
    let launch = attention::forward_with(case.tile(), &case.problem, dtype, &inputs, [16; 2])?;
    launched.insert(launch.kernel);
    let expected = case.reference();
    let eager = composed::rel_pos_attention(&case.qkv, &case.config(&case.tables, &case.pad))?;
    let eager = error(&values(&eager.0), &expected);
    let got = error(&outputs[0].values(dtype), &expected);
    assert!(got <= bound(dtype, eager), "{}: {got:e}, eager {eager:e}", case.name);
    worst.note(&format!("out {dtype:?}"), &case.name, got);
    Ok(())
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
        let sources = Sources { defines, ..Sources::files(kernels(), vec![file]) };
        Emulator::new(&sources, &cache()).unwrap_or_else(|e| panic!("{e}"))
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

    pub fn workspace_bytes(self, case: &Case, tables: bool, pad: bool) -> Result<usize> {
        let (p, trained, gpu) = (&case.problem, [tables, pad], &case.gpu());
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
    on_device: &OnDevice,
    forward: &[Memory],
    dout: &Tensor,
    trained: bool,
    launched: &mut BTreeSet<String>,
) -> Vec<Memory> {
    let dout = Memory::from_tensor(dout);
    let names = RefCell::new(launched);
    in_modes(&case.name, kernels.modes().into_iter(), |device| {
        let dtype = case.dtype;
        let (tables, pad) = (trained && case.shapes.rel_pos, trained && case.shapes.pad);
        let [dqkv, dtables, dpad] = [&case.qkv, &Tensor::cat(&case.tables, 0)?, &case.pad]
            .map(|tensor| Memory::for_elements(tensor.elem_count(), dtype));
        let workspace = Memory::new(kernels.workspace_bytes(case, tables, pad)?);
        let operands = BackwardOperands {
            out: forward[0].address(),
            lse: forward[1].address(),
            dout: dout.address(),
            dqkv: dqkv.address(),
            dtables: if tables { dtables.address() } else { 0 },
            dpad: if pad { dpad.address() } else { 0 },
            workspace: workspace.address(),
        };
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
        Ok(vec![dqkv, dtables, dpad])
    })
}

/// Gradients of qkv, the tables together, and pad, by a function of the operations.
fn gradients_by(
    case: &Case,
    dtype: DType,
    dout: &Tensor,
    f: impl Fn(&Tensor, &RelPosAttention) -> Result<Tensor>,
) -> Result<[Vec<f64>; 3]> {
    let inputs = [&case.qkv, &case.tables[0], &case.tables[1], &case.pad];
    let inputs = inputs.into_iter().map(|t| t.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
    let mut wanted = vec![inputs[0].clone()];
    if case.shapes.rel_pos {
        wanted.extend_from_slice(&inputs[1..3]);
    }
    if case.shapes.pad {
        wanted.push(inputs[3].clone());
    }
    let (_, grads) = gradients(&wanted, &dout.to_dtype(dtype)?, |t| {
        let tables = if case.shapes.rel_pos { &t[1..3] } else { &inputs[1..3] };
        let pad = if case.shapes.pad { &t[t.len() - 1] } else { &inputs[3] };
        f(&t[0], &case.config(tables, pad))
    })?;
    let mut grads = grads.iter().map(values);
    let mut next = |is: bool| if is { grads.next().unwrap() } else { Vec::new() };
    let (qkv, h, w) = (next(true), next(case.shapes.rel_pos), next(case.shapes.rel_pos));
    Ok([qkv, [h, w].concat(), next(case.shapes.pad)])
}

/// The gradients against the composed graph's in f32; with `frozen`, dqkv has the same bits where nothing else is wanted.
pub fn check_backward(
    kernels: Kernels,
    case: &Case,
    frozen: bool,
    worst: &mut Worst,
    launched: &mut BTreeSet<String>,
) -> Result<()> {
    let dtype = case.dtype;
    let on_device = case.memory()?;
    let device = Device { emulator: emulator(), mode: Mode::all().next().unwrap() };
    let forward = forward_on(&device, case, &on_device)?;
    let (b, h, w, packed) = case.qkv.dims4()?;
    let dout = random(9, (b, h, w, packed / 3)).to_dtype(dtype)?;
    let outputs = run_backward(kernels, case, &on_device, &forward, &dout, true, launched);
    if frozen {
        let frozen = run_backward(kernels, case, &on_device, &forward, &dout, false, launched);
        assert!(frozen[0].bytes() == outputs[0].bytes(), "{}: frozen", case.name);
    }

    let expected = gradients_by(case, DType::F32, &dout, ops::rel_pos_attention)?;
    let eager = gradients_by(case, dtype, &dout, |qkv, config| {
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
            let got = forward_on(&device, &case, &case.memory()?)?[0].values(dtype);
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
