//! Small problems that still go through every loop of a kernel more than once. They have five steps of queries, more
//! keys than a ring has slots, and windows that hang over the grid. Their depth exceeds a ring of stages, and each
//! persistent block has several tiles.

use crate::launch::family::Family;
use crate::launch::projection::sm90::tiles::Pass;
use crate::launch::rel_pos_attention::sm90::tiles::widths;
use crate::launch::tiles::Forced;
use crate::launch::Gpu;
use crate::ops::custom::Engine;
use crate::ops::{
    composed, projection, rel_pos_attention, Activation, Lora, Projection, RelPosAttention,
};
use crate::philox::{philox4x32, Dropout};
use candle_core::{bail, DType, Device, Result, Tensor, Var};

/// Blocks of the kernels whose blocks take turns at their work.
pub const BLOCKS: u32 = 2;

const ROWS: usize = 200;
/// Five stages of 64.
const IN_DIM: usize = 320;
const DROPOUT: Dropout = Dropout { p: 0.25, seed: 7, stream: 3 };

/// A problem, all its numbers but the values.
pub enum Problem {
    Attention {
        grid: (usize, usize),
        window: Option<usize>,
        heads: usize,
        head_dim: usize,
        /// Columns of the tile to take; none where there is one tile only.
        cols: Option<usize>,
    },
    /// q, k and v; q and v have LoRA.
    Qkv { out_dim: usize },
    /// With LoRA, GELU and a residual.
    Gelu { out_dim: usize },
}

/// The problems that try every kernel of a family.
pub fn of(family: Family) -> Vec<Problem> {
    match family {
        Family::GlobalAttention { head_dim } => {
            let of_width = |cols: usize| {
                // Five steps of queries; in the narrow tile, of which there are many, stripes that are not full.
                let grid = if cols == 16 { (21, 15) } else { (320 / cols, cols) };
                let heads = if cols == 64 { 2 } else { 1 };
                Problem::Attention { grid, window: None, heads, head_dim, cols: Some(cols) }
            };
            widths(head_dim).map(of_width).collect()
        }
        Family::WindowAttention { head_dim } => {
            let (grid, window) = ((16, 20), Some(14));
            vec![Problem::Attention { grid, window, heads: 2, head_dim, cols: None }]
        }
        Family::Projection => vec![Problem::Qkv { out_dim: 200 }, Problem::Gelu { out_dim: 264 }],
    }
}

/// Who computes a problem.
#[derive(Clone, Copy)]
pub enum By {
    /// The composed graph, without its warning.
    Composed,
    Engine(Engine),
}

/// A problem's tensors on one device, in one dtype.
pub struct Inputs {
    /// Those that have gradients.
    variables: Vec<Tensor>,
    frozen: Vec<Tensor>,
    /// The gradient of the output.
    grad: Tensor,
}

impl Inputs {
    fn map(&self, f: impl Fn(&Tensor) -> Result<Tensor>) -> Result<Self> {
        let all = |tensors: &[Tensor]| tensors.iter().map(&f).collect::<Result<Vec<_>>>();
        let (variables, frozen) = (all(&self.variables)?, all(&self.frozen)?);
        Ok(Self { variables, frozen, grad: f(&self.grad)? })
    }

    pub fn to_dtype(&self, dtype: DType) -> Result<Self> {
        self.map(|tensor| tensor.to_dtype(dtype))
    }

    pub fn to_device(&self, device: &Device) -> Result<Self> {
        self.map(|tensor| tensor.to_device(device))
    }
}

/// The GPU with the tiles that a problem's kernels are made to take.
#[derive(Clone, Copy)]
pub struct Case(pub Gpu);

impl Case {
    /// The tile of a projection's forward, for the name of a result.
    pub fn suffix(self) -> String {
        let tile = self.0.forced.projection_forward;
        tile.map_or(String::new(), |tile| format!(" {}", tile.name))
    }
}

/// Values of variance `scale^2`, the same in every run.
fn random(seed: u32, shape: &[usize], scale: f64) -> Result<Tensor> {
    let count = shape.iter().product::<usize>();
    let words = (0..count.div_ceil(4) as u32).flat_map(|i| philox4x32([i, seed, 0, 0], [1, 2]));
    let width = scale * 12f64.sqrt();
    let value = |word: u32| ((f64::from(word) / f64::from(u32::MAX) - 0.5) * width) as f32;
    Tensor::from_vec(words.take(count).map(value).collect::<Vec<_>>(), shape, &Device::Cpu)
}

impl Problem {
    pub fn name(&self) -> String {
        match self {
            Self::Attention { grid: (h, w), window: None, .. } => format!("{h}x{w}"),
            Self::Attention { grid: (h, w), window: Some(side), .. } => {
                format!("{h}x{w} in {side}x{side}")
            }
            Self::Qkv { .. } => "qkv".to_string(),
            Self::Gelu { .. } => "gelu".to_string(),
        }
    }

    /// The tiles to try: with the native kernels every tile that this GPU's problems may get.
    pub fn cases(&self, gpu: Gpu) -> Vec<Case> {
        if gpu.native.is_none() {
            return vec![Case(gpu)];
        }
        let case = |forced| Case(Gpu { forced, ..gpu });
        match self {
            Self::Attention { cols, .. } => {
                vec![case(Forced { attention_cols: *cols, ..Forced::NONE })]
            }
            Self::Qkv { .. } | Self::Gelu { .. } => {
                let [forward, backward] = Pass::ALL.map(|pass| pass.tiles_in_use(gpu.clusters));
                let both = forward.zip(backward).map(|(forward, backward)| Forced {
                    projection_forward: Some(forward),
                    projection_backward: Some(backward),
                    ..Forced::NONE
                });
                both.map(case).collect()
            }
        }
    }

    /// Random tensors in f32 on the CPU.
    pub fn inputs(&self) -> Result<Inputs> {
        let part = |seed: u32, out_dim: usize, rank: usize| -> Result<[Tensor; 4]> {
            Ok([
                random(seed, &[out_dim, IN_DIM], (IN_DIM as f64).powf(-0.5))?,
                random(seed + 1, &[out_dim], 1.0)?,
                random(seed + 2, &[rank, IN_DIM], (IN_DIM as f64).powf(-0.5))?,
                random(seed + 3, &[out_dim, rank], (rank as f64).powf(-0.5))?,
            ])
        };
        match *self {
            Self::Attention { grid: (h, w), window, heads, head_dim, .. } => {
                let (side_h, side_w) = window.map_or((h, w), |side| (side, side));
                let packed = 3 * heads * head_dim;
                let mut variables = vec![
                    random(1, &[1, h, w, packed], 1.0)?,
                    random(2, &[2 * side_h - 1, head_dim], 0.3)?,
                    random(3, &[2 * side_w - 1, head_dim], 0.3)?,
                ];
                if window.is_some() {
                    variables.push(random(4, &[packed], 1.0)?);
                }
                let grad = random(5, &[1, h, w, packed / 3], 1.0)?;
                Ok(Inputs { variables, frozen: vec![], grad })
            }
            Self::Qkv { out_dim, .. } => {
                let [q, k, v] =
                    [(10, 8), (20, 1), (30, 16)].map(|(s, rank)| part(s, out_dim, rank));
                let ([wq, bq, aq, rq], [wk, bk, ..], [wv, bv, av, rv]) = (q?, k?, v?);
                let x = random(1, &[ROWS, IN_DIM], 1.0)?;
                let variables = vec![x, bq, bk, bv, aq, rq, av, rv];
                let grad = random(2, &[ROWS, 3 * out_dim], 1.0)?;
                Ok(Inputs { variables, frozen: vec![wq, wk, wv], grad })
            }
            Self::Gelu { out_dim, .. } => {
                let [weight, bias, a, b] = part(10, out_dim, 16)?;
                let x = random(1, &[ROWS, IN_DIM], 1.0)?;
                let [residual, grad] = [2, 3].map(|seed| random(seed, &[ROWS, out_dim], 1.0));
                let variables = vec![x, bias, a, b];
                Ok(Inputs { variables, frozen: vec![weight, residual?], grad: grad? })
            }
        }
    }

    /// The names of [`results`](Self::results).
    pub fn result_names(&self) -> Vec<&'static str> {
        match self {
            Self::Attention { window: None, .. } => {
                vec!["out", "dq", "dk", "dv", "drel_h", "drel_w"]
            }
            Self::Attention { window: Some(_), .. } => {
                vec!["out", "dq", "dk", "dv", "drel_h", "drel_w", "dpad_q", "dpad_k", "dpad_v"]
            }
            Self::Qkv { .. } => {
                vec!["out", "dx", "dbias_q", "dbias_k", "dbias_v", "dA_q", "dB_q", "dA_v", "dB_v"]
            }
            Self::Gelu { .. } => vec!["out", "dx", "dbias", "dA", "dB"],
        }
    }

    /// The output and the gradients. Gradients of q, k and v differ in size, so each is a result of its own.
    pub fn results(&self, inputs: &Inputs, by: By) -> Result<Vec<Vec<f32>>> {
        let variables =
            inputs.variables.iter().map(Var::from_tensor).collect::<Result<Vec<_>>>()?;
        let tensors: Vec<Tensor> = variables.iter().map(|v| v.as_tensor().clone()).collect();
        let out = self.run(&tensors, &inputs.frozen, by)?;
        let gradients = (&out * &inputs.grad)?.sum_all()?.backward()?;
        let mut results = vec![values(&out)?];
        for (index, tensor) in tensors.iter().enumerate() {
            let Some(gradient) = gradients.get(tensor) else {
                bail!("{}: variable {index} has no gradient", self.name())
            };
            match (self, index) {
                (Self::Attention { .. }, 0 | 3) => {
                    let gradient = gradient.to_device(&Device::Cpu)?;
                    for part in gradient.chunk(3, gradient.rank() - 1)? {
                        results.push(values(&part)?);
                    }
                }
                _ => results.push(values(gradient)?),
            }
        }
        Ok(results)
    }

    fn run(&self, t: &[Tensor], frozen: &[Tensor], by: By) -> Result<Tensor> {
        let lora = |a, b, dropout| Some(Lora { a, b, b_bias: None, scaling: 2.0, dropout });
        match *self {
            Self::Attention { window, heads, head_dim, .. } => {
                let config = RelPosAttention {
                    num_heads: heads,
                    softmax_scale: (head_dim as f64).powf(-0.5),
                    rel_pos: Some((&t[1], &t[2])),
                    window,
                    pad: t.get(3),
                    dropout: None,
                };
                match by {
                    By::Composed => Ok(composed::rel_pos_attention(&t[0], &config)?.0),
                    By::Engine(engine) => rel_pos_attention::by(&t[0], &config, engine),
                }
            }
            Self::Qkv { .. } => {
                let part = |i: usize, lora| Projection {
                    weight: &frozen[i],
                    scales: None,
                    bias: Some(&t[1 + i]),
                    lora,
                };
                let of_v = Dropout { stream: DROPOUT.stream + 1, ..DROPOUT };
                let parts = [
                    part(0, lora(&t[4], &t[5], Some(DROPOUT))),
                    part(1, None),
                    part(2, lora(&t[6], &t[7], Some(of_v))),
                ];
                match by {
                    By::Composed => composed::lora_qkv(&t[0], &parts),
                    By::Engine(engine) => {
                        projection::by(&t[0], &parts, Activation::Identity, None, engine)
                    }
                }
            }
            Self::Gelu { .. } => {
                let lora = lora(&t[2], &t[3], None);
                let part = Projection { weight: &frozen[0], scales: None, bias: Some(&t[1]), lora };
                let residual = Some(&frozen[1]);
                match by {
                    By::Composed => composed::lora_linear(&t[0], &part, Activation::Gelu, residual),
                    By::Engine(engine) => {
                        projection::by(&t[0], &[part], Activation::Gelu, residual, engine)
                    }
                }
            }
        }
    }
}

/// All values, on the host.
fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    tensor.to_device(&Device::Cpu)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::launch::self_test::error;
    use std::time::Instant;

    /// Needs no GPU: a truth that were wrong would refuse right kernels.
    #[test]
    fn the_truth_is_the_composed_graphs_in_f32() -> Result<()> {
        for family in Family::ALL {
            for problem in of(family) {
                let inputs = problem.inputs()?;
                let start = Instant::now();
                let truth = problem.results(&inputs, By::Engine(Engine::Cpu))?;
                println!("{family} {}: {:?}", problem.name(), start.elapsed());
                let composed = problem.results(&inputs, By::Composed)?;
                let names = problem.result_names();
                assert_eq!([truth.len(), composed.len()], [names.len(); 2]);
                for (name, (truth, composed)) in names.iter().zip(truth.iter().zip(&composed)) {
                    let error = error(composed, truth);
                    assert!(error < 1e-5, "{family} {} {name}: {error:e}", problem.name());
                    // Zeros alone would show no error; nobody asks a padded token.
                    assert_eq!(truth.iter().any(|x| *x != 0.0), *name != "dpad_q", "{name}");
                }
            }
        }
        Ok(())
    }

    #[test]
    fn every_tile_in_use_is_a_case() {
        let mut tried = Vec::new();
        for family in Family::ALL {
            for problem in of(family) {
                let cases = problem.cases(Gpu::H100);
                tried.extend(cases.into_iter().map(|case| (family, case.0.forced)));
                assert_eq!(problem.cases(Gpu::A100).len(), 1);
            }
        }
        for pass in Pass::ALL {
            for tile in pass.tiles_in_use(true) {
                let is_tried = |(_, forced): &(_, Forced)| match pass {
                    Pass::Forward => forced.projection_forward == Some(tile),
                    Pass::BackwardInput => forced.projection_backward == Some(tile),
                };
                assert!(tried.iter().any(is_tried), "{pass:?} {tile:?}");
            }
        }
        for head_dim in [64, 80] {
            for cols in widths(head_dim) {
                let forced = Forced { attention_cols: Some(cols), ..Forced::NONE };
                assert!(tried.contains(&(Family::GlobalAttention { head_dim }, forced)), "{cols}");
            }
        }
    }
}
