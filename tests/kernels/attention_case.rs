//! A case of the attention for the emulator: its shapes, its tensors, and its buffers on the device.
#![allow(dead_code)]

use super::device::{launch_all, Device, Memory};
use crate::common::{gradients, random, values};
use candle_core::{DType, Result, Tensor};
use candle_sam_lora::launch::rel_pos_attention::tiles::{self, Tile};
use candle_sam_lora::launch::rel_pos_attention::{self as attention, BackwardOperands, Inputs};
use candle_sam_lora::launch::tiles::Forced;
use candle_sam_lora::launch::{AttentionProblem, Gpu};
use candle_sam_lora::ops::RelPosAttention;
use candle_sam_lora::philox::Dropout;
use candle_sam_lora::testing::reference;

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

impl Shapes {
    /// Sides of a window, or of the grid.
    fn sides(&self) -> (usize, usize) {
        self.window.map_or(self.grid, |side| (side, side))
    }
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
        let Shapes { batch, grid: (h, w), heads, dim, .. } = shapes;
        let (side_h, side_w) = shapes.sides();
        let tensor = |seed, shape: &[usize]| random(seed, shape).to_dtype(dtype);
        let qkv = tensor(1, &[batch, h, w, 3 * heads * dim])?;
        let tables = [
            (tensor(2, &[2 * side_h - 1, dim])? * 0.3)?,
            (tensor(3, &[2 * side_w - 1, dim])? * 0.3)?,
        ];
        let pad = match shapes.pad {
            true => tensor(4, &[3 * heads * dim])?,
            false => Tensor::zeros(3 * heads * dim, dtype, qkv.device())?,
        };
        Ok(Self::of(shapes, qkv, tables, pad))
    }

    /// The case of these tensors, which are of one dtype.
    pub fn of(shapes: Shapes, qkv: Tensor, tables: [Tensor; 2], pad: Tensor) -> Self {
        let Shapes { batch, grid: (h, w), heads, dim, rel_pos, dropout, .. } = shapes;
        let (side_h, side_w) = shapes.sides();
        let problem = AttentionProblem {
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
        };
        let dtype = qkv.dtype();
        let name = format!("{shapes:?} {dtype:?}");
        Self { name, shapes, problem, dtype, cols: None, qkv, tables, pad }
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

    pub fn memory(&self) -> OnDevice {
        OnDevice {
            qkv: Memory::from_tensor(&self.qkv),
            tables: self.tables.each_ref().map(Memory::from_tensor),
            pad: Memory::from_tensor(&self.pad),
            rel_pos: self.shapes.rel_pos,
            has_pad: self.shapes.pad,
        }
    }

    /// Room for output and lse.
    pub fn outputs(&self) -> [Memory; 2] {
        let lse = attention::lse_elements(&self.problem, self.dtype);
        let out = Memory::for_elements(self.qkv.elem_count() / 3, self.dtype);
        [out, Memory::for_elements(lse, DType::F32)]
    }

    /// The gradient of the output, made from a seed.
    pub fn dout(&self, seed: u64) -> Result<Tensor> {
        let (b, h, w, packed) = self.qkv.dims4()?;
        random(seed, (b, h, w, packed / 3)).to_dtype(self.dtype)
    }

    /// Room for the backward; tables and pad have gradients if they are `trained`.
    pub fn backward(&self, dout: &Tensor, trained: [bool; 2], workspace_bytes: usize) -> Backward {
        let [h, w] = self.tables.each_ref().map(Tensor::elem_count);
        let elements = [self.qkv.elem_count(), h + w, self.pad.elem_count()];
        Backward {
            gradients: elements.map(|count| Memory::for_elements(count, self.dtype)),
            trained,
            dout: Memory::from_tensor(dout),
            workspace: Memory::new(workspace_bytes),
        }
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

/// Output and lse.
pub fn forward_on(device: &Device, case: &Case, on_device: &OnDevice) -> Result<Vec<Memory>> {
    let outputs = case.outputs();
    let (inputs, to) = (on_device.inputs(), outputs.each_ref().map(Memory::address));
    let launch = attention::forward_with(case.tile(), &case.problem, case.dtype, &inputs, to)?;
    launch_all(device, &[launch])?;
    Ok(outputs.into())
}

/// The backward's own buffers.
pub struct Backward {
    /// dqkv, dtables, dpad.
    pub gradients: [Memory; 3],
    /// The tables, the pad.
    pub trained: [bool; 2],
    dout: Memory,
    workspace: Memory,
}

impl Backward {
    /// Operands of the backward, after a forward's output and lse.
    pub fn operands(&self, forward: &[Memory]) -> BackwardOperands {
        let [dqkv, dtables, dpad] = self.gradients.each_ref().map(Memory::address);
        let wanted = |gradient, trained| if trained { gradient } else { 0 };
        BackwardOperands {
            out: forward[0].address(),
            lse: forward[1].address(),
            dout: self.dout.address(),
            dqkv,
            dtables: wanted(dtables, self.trained[0]),
            dpad: wanted(dpad, self.trained[1]),
            workspace: self.workspace.address(),
        }
    }
}

/// Output, and gradients of qkv, the tables together, and pad, by a function of the operations.
pub fn gradients_by(
    case: &Case,
    dtype: DType,
    dout: &Tensor,
    f: impl Fn(&Tensor, &RelPosAttention) -> Result<Tensor>,
) -> Result<(Tensor, [Vec<f64>; 3])> {
    let inputs = [&case.qkv, &case.tables[0], &case.tables[1], &case.pad];
    let inputs = inputs.into_iter().map(|t| t.to_dtype(dtype)).collect::<Result<Vec<_>>>()?;
    let mut wanted = vec![inputs[0].clone()];
    if case.shapes.rel_pos {
        wanted.extend_from_slice(&inputs[1..3]);
    }
    if case.shapes.pad {
        wanted.push(inputs[3].clone());
    }
    let (out, grads) = gradients(&wanted, &dout.to_dtype(dtype)?, |t| {
        let tables = if case.shapes.rel_pos { &t[1..3] } else { &inputs[1..3] };
        let pad = if case.shapes.pad { &t[t.len() - 1] } else { &inputs[3] };
        f(&t[0], &case.config(tables, pad))
    })?;
    let mut grads = grads.iter().map(values);
    let mut next = |is: bool| if is { grads.next().unwrap() } else { Vec::new() };
    let (qkv, h, w) = (next(true), next(case.shapes.rel_pos), next(case.shapes.rel_pos));
    Ok((out, [qkv, [h, w].concat(), next(case.shapes.pad)]))
}
