//! Attention between two sets of tokens: `kernels/multi_head/fwd.cuh`, and the two passes of its backward.

pub mod tile;
pub mod tiles;

use super::bindings::{
    MultiHeadBwdParams, MultiHeadBwdRowsParams, MultiHeadFwdParams, MultiHeadShape,
    MULTI_HEAD_THREADS,
};
use super::cache::Plans;
use super::plan::Plan;
use super::slots::{input, output, present, WORKSPACE};
use super::{device_ptr, sum_partials, Gpu, Launch, MultiHeadProblem};
use candle_core::{bail, DType, Result};
use std::sync::{Arc, LazyLock};
use tile::Tile;

const OP: &str = MultiHeadProblem::OP;
/// Warps that keep a multiprocessor busy: while some wait for memory, others compute.
const WARPS: u64 = 16;
/// Tiles of columns that are worth a block of their own.
const LEAST_TILES: u64 = 4;

/// A pass, and what it makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Pass {
    /// Inputs q, k, v; outputs out and, if there is a backward to come, what [`Plan::saved`] counts.
    Forward {
        /// Whether there is.
        saves: bool,
    },
    /// Inputs q, k, v, out, what the forward saved, the gradient of out; outputs dq, dk, dv.
    Backward {
        /// Whether dq is wanted.
        q: bool,
        /// Whether dk and dv are.
        kv: bool,
    },
}

/// Whether kernels of the GPU compute the problem.
pub fn covers(problem: &MultiHeadProblem, dtype: DType, gpu: &Gpu) -> bool {
    // Kernels write channels of 16 bits in pairs.
    let pairs = (problem.head_dim * dtype.size_in_bytes()).is_multiple_of(4);
    let counts = [flat(problem).queries, problem.keys, problem.num_heads * problem.batch];
    let counted = counts.iter().all(|count| u32::try_from(*count).is_ok_and(|n| n < 1 << 31));
    gpu.portable && pairs && counted && tiles::pick((1, 1), problem.head_dim, dtype).is_some()
}

/// The launches of a pass.
///
/// # Errors
/// - no kernel covers the problem;
/// - no grid covers its shapes.
pub fn plan(problem: &MultiHeadProblem, pass: Pass, dtype: DType, gpu: &Gpu) -> Result<Arc<Plan>> {
    static PLANS: LazyLock<Plans<(MultiHeadProblem, Pass, DType, Gpu)>> =
        LazyLock::new(Plans::default);
    PLANS.get_or(&(*problem, pass, dtype, *gpu), |_| {
        if !covers(problem, dtype, gpu) {
            bail!("{OP}: no kernel computes {problem:?} in {dtype:?}")
        }
        let problem = &flat(problem);
        let plan = match pass {
            Pass::Forward { saves } => forward(problem, saves, dtype, gpu),
            Pass::Backward { q, kv } => backward(problem, [q, kv], dtype, gpu),
        };
        plan.map(Arc::new)
    })
}

/// The problem with as many entries of k and v as of the output: all queries of shared keys are those of one entry.
fn flat(problem: &MultiHeadProblem) -> MultiHeadProblem {
    match (problem.kv_batch, problem.batch) {
        (1, batch) => {
            MultiHeadProblem { batch: 1, q_batch: 1, queries: batch * problem.queries, ..*problem }
        }
        _ => *problem,
    }
}

/// Rows of weights: queries of all heads of all entries.
fn weight_rows(p: &MultiHeadProblem) -> u64 {
    (p.batch * p.num_heads * p.queries) as u64
}

fn shape(p: &MultiHeadProblem, split_tiles: u64) -> MultiHeadShape {
    MultiHeadShape {
        batch: p.batch as u32,
        shared_q: u32::from(p.q_batch < p.batch),
        queries: p.queries as u32,
        keys: p.keys as u32,
        num_heads: p.num_heads as u32,
        head_dim: p.head_dim as u32,
        softmax_scale: p.softmax_scale,
        split_tiles: split_tiles as u32,
    }
}

/// The work of a kernel: entries with rows, and the columns that each row meets.
struct Work {
    tile: &'static Tile,
    /// Blocks of rows of all heads of all entries.
    blocks: u64,
    /// Blocks that share out the columns of a row.
    splits: u64,
    /// Tiles of columns of each.
    split_tiles: u64,
}

impl Work {
    /// `rows` are the entries and the rows of each, `columns` the entries that a row meets and the columns of each.
    fn new(
        p: &MultiHeadProblem,
        rows: (usize, usize),
        columns: (usize, usize),
        dtype: DType,
        gpu: &Gpu,
    ) -> Result<Self> {
        let Some(tile) = tiles::pick((rows.1, columns.1), p.head_dim, dtype) else {
            bail!("{OP}: no kernel takes heads of {} {dtype:?}", p.head_dim)
        };
        let blocks = (rows.0 * p.num_heads * rows.1.div_ceil(tile.rows)) as u64;
        let tiles = (columns.0 * columns.1.div_ceil(tile.columns)) as u64;
        let wanted = WARPS * u64::from(gpu.multiprocessors) / (blocks * u64::from(tile.warps()));
        let split_tiles = tiles.div_ceil(wanted.clamp(1, tiles.div_ceil(LEAST_TILES)));
        Ok(Self { tile, blocks, splits: tiles.div_ceil(split_tiles), split_tiles })
    }

    fn launch<P: super::Params>(
        &self,
        family: &str,
        dtype: DType,
        shared_bytes: u32,
        params: &P,
    ) -> Result<Launch> {
        let (instance, threads) = (self.tile.instance(family), 32 * self.tile.warps());
        let grid = [self.blocks, self.splits, 1];
        let launch = Launch::new(&instance, dtype, grid, threads, params)?;
        Ok(Launch { shared_bytes, ..launch })
    }
}

/// A launch of a thread for each of `count` things.
fn of_threads<P: super::Params>(
    kernel: &str,
    dtype: DType,
    count: u64,
    params: &P,
) -> Result<Launch> {
    let grid = [count.div_ceil(MULTI_HEAD_THREADS.into()), 1, 1];
    Launch::new(kernel, dtype, grid, MULTI_HEAD_THREADS, params)
}

/// Where the statistics of the rows lie in what a forward saves, and the output in f32, if it is of 16 bits.
fn saved(p: &MultiHeadProblem, dtype: DType, at: device_ptr) -> [device_ptr; 2] {
    [at, present(dtype != DType::F32, at + 8 * weight_rows(p))]
}

fn forward(p: &MultiHeadProblem, saves: bool, dtype: DType, gpu: &Gpu) -> Result<Plan> {
    let work = Work::new(p, (p.batch, p.queries), (1, p.keys), dtype, gpu)?;
    let (rows, head_dim) = (weight_rows(p), p.head_dim as u64);
    let [statistics, exact] = if saves { saved(p, dtype, output(1)) } else { [0; 2] };
    let params = MultiHeadFwdParams {
        q: input(0),
        k: input(1),
        v: input(2),
        out: output(0),
        statistics,
        exact,
        partials: present(work.splits > 1, WORKSPACE),
        splits: work.splits,
        shape: shape(p, work.split_tiles),
    };
    let mut steps = vec![work.launch("multi_head_fwd", dtype, work.tile.forward_bytes, &params)?];
    let mut workspace_bytes = 0;
    if work.splits > 1 {
        steps.push(of_threads("multi_head_fwd_combine", dtype, rows * head_dim, &params)?);
        workspace_bytes = 4 * (work.splits * rows * (head_dim + 2)) as usize;
    }
    let exact_elements = if exact == 0 { 0 } else { rows * head_dim };
    let saved = if saves { (2 * rows + exact_elements) as usize } else { 0 };
    Ok(Plan { steps, workspace_bytes, saved })
}

fn backward(p: &MultiHeadProblem, wanted: [bool; 2], dtype: DType, gpu: &Gpu) -> Result<Plan> {
    let [statistics, exact] = saved(p, dtype, input(4));
    let rows = weight_rows(p);
    let params = MultiHeadBwdRowsParams {
        out: input(3),
        exact,
        dout: input(5),
        statistics,
        rows: WORKSPACE,
        shape: shape(p, 0),
    };
    let mut steps = vec![of_threads("multi_head_bwd_rows", dtype, rows, &params)?];
    let partials = WORKSPACE + 16 * rows;
    let mut workspace_bytes = 16 * rows;
    let (queries, keys) = ((p.q_batch, p.queries), (p.batch, p.keys));
    let by_query = ("multi_head_bwd_query", queries, (p.batch / p.q_batch, p.keys), &[0][..]);
    let by_key = ("multi_head_bwd_key", keys, (1, p.queries), &[1, 2][..]);
    let passes = [by_query, by_key].into_iter().zip(wanted).filter(|(_, wanted)| *wanted);
    for ((family, rows, columns, outputs), _) in passes {
        let work = Work::new(p, rows, columns, dtype, gpu)?;
        let size = (rows.0 * rows.1 * p.channels()) as u64;
        let split = work.splits > 1;
        // The passes take turns at the memory behind the rows.
        let sums = |i: usize| partials + 4 * i as u64 * work.splits * size;
        let mut grads = [0; 2];
        for (i, &out) in outputs.iter().enumerate() {
            grads[i] = if split { sums(i) } else { output(out) };
        }
        let params = MultiHeadBwdParams {
            q: input(0),
            k: input(1),
            v: input(2),
            dout: input(5),
            rows: WORKSPACE,
            grads,
            split_stride: if split { size } else { 0 },
            shape: shape(p, work.split_tiles),
        };
        steps.push(work.launch(family, dtype, work.tile.backward_bytes, &params)?);
        if split {
            for (i, &out) in outputs.iter().enumerate() {
                steps.push(sum_partials::launch(dtype, sums(i), output(out), work.splits, size)?);
            }
            workspace_bytes = workspace_bytes.max(sums(outputs.len()) - WORKSPACE);
        }
    }
    Ok(Plan { steps, workspace_bytes: workspace_bytes as usize, saved: 0 })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A prompt's tokens look at the image.
    const FEW: MultiHeadProblem = MultiHeadProblem {
        batch: 1,
        q_batch: 1,
        kv_batch: 1,
        queries: 7,
        keys: 4096,
        num_heads: 8,
        head_dim: 16,
        softmax_scale: 0.25,
    };
    const TRAINED: Pass = Pass::Backward { q: true, kv: true };

    fn steps(problem: &MultiHeadProblem, pass: Pass) -> Result<Vec<(String, [u32; 3])>> {
        let plan = plan(problem, pass, DType::BF16, &Gpu::H100)?;
        Ok(plan.steps.iter().map(|step| (step.kernel.clone(), step.grid)).collect())
    }

    fn named(steps: &[(&str, [u32; 3])]) -> Vec<(String, [u32; 3])> {
        steps.iter().map(|(name, grid)| (format!("multi_head_{name}_bf16"), *grid)).collect()
    }

    #[test]
    fn few_queries_share_out_the_keys() -> Result<()> {
        let expected = named(&[("fwd_hd16_16x32", [8, 32, 1]), ("fwd_combine", [4, 1, 1])]);
        assert_eq!(steps(&FEW, Pass::Forward { saves: false })?, expected);
        // Enough prompts leave each block all keys.
        let many = MultiHeadProblem { batch: 300, q_batch: 300, kv_batch: 300, ..FEW };
        let expected = named(&[("fwd_hd16_16x32", [2400, 1, 1])]);
        assert_eq!(steps(&many, Pass::Forward { saves: false })?, expected);
        Ok(())
    }

    #[test]
    fn queries_of_shared_keys_fill_tiles_together() -> Result<()> {
        let shared = MultiHeadProblem { batch: 64, q_batch: 64, ..FEW };
        let steps = steps(&shared, Pass::Forward { saves: true })?;
        assert_eq!(steps[0], named(&[("fwd_hd16_64x32", [56, 9, 1])])[0]);
        Ok(())
    }

    #[test]
    fn the_gradients_that_nobody_wants_are_not_computed() -> Result<()> {
        let image = MultiHeadProblem { batch: 16, kv_batch: 16, queries: 4096, keys: 7, ..FEW };
        let all = steps(&image, TRAINED)?;
        let names: Vec<_> = all.iter().map(|(name, _)| name.as_str()).collect();
        let (rows, query) = ("multi_head_bwd_rows_bf16", "multi_head_bwd_query_hd16_64x16_bf16");
        let (key, sum) = ("multi_head_bwd_key_hd16_16x32_bf16", "sum_partials_bf16");
        assert_eq!(names, [rows, query, key, sum, sum]);
        assert_eq!(steps(&image, Pass::Backward { q: true, kv: false })?, all[..2]);
        // One q of all entries: its blocks meet the keys of all.
        assert_eq!(all[1].1, [8 * 64, 1, 1]);
        Ok(())
    }

    #[test]
    fn every_tile_of_columns_has_a_block() -> Result<()> {
        for (batch, queries, keys) in [(1, 1, 1), (2, 9, 33), (1, 7, 4096), (64, 4096, 9)] {
            let p = MultiHeadProblem { batch, queries, keys, ..FEW };
            for multiprocessors in [1, 4, 132] {
                let gpu = Gpu { multiprocessors, ..Gpu::H100 };
                let work = Work::new(&p, (batch, queries), (3, keys), DType::F32, &gpu)?;
                let tiles = 3 * keys.div_ceil(work.tile.columns) as u64;
                assert!(work.splits * work.split_tiles >= tiles, "{p:?}");
                assert!((work.splits - 1) * work.split_tiles < tiles, "{p:?}: an idle block");
            }
        }
        Ok(())
    }

    #[test]
    fn a_problem_that_no_kernel_covers_is_refused() -> Result<()> {
        let wide = MultiHeadProblem { head_dim: 33, ..FEW };
        let odd = MultiHeadProblem { head_dim: 5, ..FEW };
        let old = Gpu { portable: false, ..Gpu::A100 };
        assert!(!covers(&wide, DType::F32, &Gpu::H100) && !covers(&odd, DType::F16, &Gpu::H100));
        assert!(covers(&odd, DType::F32, &Gpu::H100) && !covers(&FEW, DType::F32, &old));
        assert!(plan(&wide, TRAINED, DType::F32, &Gpu::H100).is_err());
        Ok(())
    }

    #[test]
    fn sixteen_bits_save_the_output_in_f32() -> Result<()> {
        let saved = |dtype, saves| {
            plan(&FEW, Pass::Forward { saves }, dtype, &Gpu::H100).map(|plan| plan.saved)
        };
        assert_eq!(saved(DType::F32, true)?, 2 * 7 * 8);
        assert_eq!(saved(DType::BF16, true)?, (2 + 16) * 7 * 8);
        assert_eq!(saved(DType::BF16, false)?, 0);
        Ok(())
    }
}
